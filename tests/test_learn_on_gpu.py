"""Learning shown on a GPU: what needs none, the deadline of the loop and the figures that are recorded."""

import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from flows import steps
from stages.artifacts import RunDir, StageId, history
from tests import small_stages, synthetic_run
from tests.bench import learn_on_gpu

ITERATION_S = 30.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that the driver sees: ITERATION_S pass in every rollout and none elsewhere."""
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now

    def function(name: str):
        def run(context) -> None:
            getattr(small_stages, name)(context)
            clock.now += ITERATION_S if name == "rollout" else 0.0

        return run

    monkeypatch.setattr(steps, "stage_function", function)
    monkeypatch.setattr(learn_on_gpu, "time", clock)
    return clock


def test_a_run_without_time_left_is_closed_where_it_is_and_made_longer_by_a_further_call(
    clock: SimpleNamespace, tmp_path: Path
) -> None:
    config = learn_on_gpu.configuration(tmp_path / "model", iterations=6)
    run = RunDir.create(tmp_path / "run", config)
    # Rollouts begin at 0, 30, 60 and 90; the fifth would begin at 120.
    assert learn_on_gpu.train(run, config, deadline=100.0) == 4
    assert [stage.index for stage in history.finished(run) if stage.name == "evaluate"] == [0, 4]
    assert run.config().train.iterations == 4
    first = run.folder(StageId("update", 0)).stat().st_ino
    assert learn_on_gpu.train(run, config, deadline=1e9) == 6
    finished = history.finished(run)
    assert [stage.index for stage in finished if stage.name == "evaluate"] == [0, 4, 6]
    assert not any(stage.name == "export" for stage in finished)
    assert run.folder(StageId("update", 0)).stat().st_ino == first
    assert clock.now == 6 * ITERATION_S


def test_without_time_for_one_iteration_nothing_but_the_first_evaluation_is_made(
    clock: SimpleNamespace, tmp_path: Path
) -> None:
    config = learn_on_gpu.configuration(tmp_path / "model", iterations=6)
    run = RunDir.create(tmp_path / "run", config)
    assert learn_on_gpu.train(run, config, deadline=-1.0) == 0
    assert [str(stage) for stage in history.finished(run)] == [str(StageId("load")), str(StageId("evaluate", 0))]


def test_what_is_recorded_are_the_runs_own_figures_without_its_tokens(tmp_path: Path) -> None:
    config = synthetic_run.config_of(iterations=3, prompts=2, group_size=4, programs=6)
    run = synthetic_run.write(tmp_path / "run", config)
    (tmp_path / "self-check.json").write_text('{"failed": []}')
    body = learn_on_gpu.record(run, tmp_path, tmp_path / "record", gpu="NVIDIA H200", command="python -m x")
    (path,) = (tmp_path / "record").glob("learn-h200-*.json")
    written = json.loads(path.read_text())
    assert written["self_check"] == {"failed": []}
    assert written["versions"]["torch"]

    for updates in (0, 3):
        (part,) = run.folder(StageId("evaluate", updates)).glob("evaluations-*.parquet")
        rows = [row for row in pq.read_table(part).to_pylist() if row["kind"] == "policy"]
        mean, low, high = written["held_out"][str(updates)]["mean_score"]
        assert mean == pytest.approx(statistics.mean(row["mean_score"] for row in rows), rel=1e-4)
        assert low <= mean <= high
    rewards = []
    for index in range(3):
        (part,) = run.folder(StageId("score", index)).glob("scores-*.parquet")
        rewards.append(statistics.mean(pq.read_table(part)["reward"].to_pylist()))
    assert written["rewards"] == pytest.approx(rewards, rel=1e-4)
    before, after = (written["held_out"][key]["mean_score"] for key in ("0", "3"))
    assert written["learned"] == (after[1] > before[2])
    assert body["iterations"] == 3

    scores = pq.read_table(tmp_path / "record" / "scores.parquet")
    assert len(scores) == 3 * 8
    assert statistics.mean(scores["reward"].to_pylist()) == pytest.approx(statistics.mean(rewards))
    assert not {"program", "games", "prompt_ids"} & set(scores.column_names)
    evaluations = pq.read_table(tmp_path / "record" / "evaluations.parquet")
    assert set(evaluations["updates"].to_pylist()) == {0, 3}
    metrics = pq.read_table(tmp_path / "record" / "metrics.parquet")
    assert set(metrics["iteration"].to_pylist()) == {0, 1, 2}
    assert "<html" in (tmp_path / "record" / "report.html").read_text()
    assert any("ratio" in line for line in learn_on_gpu.words_of(body))


def test_a_failed_attack_stops_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(learn_on_gpu, "attack", lambda: {"failed": ["fork, guarded: it got out"]})
    (tmp_path / "model").mkdir()
    with pytest.raises(SystemExit, match="self-check"):
        learn_on_gpu.prepare(tmp_path, [])
    assert not (tmp_path / "self-check.json").exists()
