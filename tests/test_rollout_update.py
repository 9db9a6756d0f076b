"""rollout and update on the bundled model, with rewards made up from the programs' lengths: no sandbox needed."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flows.config import overridden
from flows.presets import preset
from stages import load, rollout, update
from stages.artifacts import RunDir, Session, StageContext, StageId, execute
from stages.artifacts.parquet import METRICS, ROLLOUTS, SAMPLES, read_table, scores_schema, write_parts
from stages.config import RunConfig, UserError
from stages.engine import Engine
from stages.model.policy import Policy
from stages.runs import show
from stages.trainer import Pack, Sample, completion_logprobs
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "rollout.max_new_tokens=64",
    "train.iterations=2",
    "model.experts=dequantized",
    "update.kl=0.01",
    "update.replay_routes=true",
]


def settings() -> RunConfig:
    return overridden(preset("tiny_test"), SETTINGS)


def short_is_good(context: StageContext) -> None:
    """A score stage without a sandbox: the shorter the better, so that groups have a signal."""
    rows = read_table(context.input(StageId("rollout", context.stage.index)), "rollouts", ROLLOUTS).to_pylist()
    scored = [
        {
            "completion_id": r["completion_id"],
            "outcome": "ok",
            "reward": -len(set(r["completion_ids"])),
            "reward_x": 0.0,
        }
        for r in rows
    ]
    write_parts(context.out, "scores", scored, scores_schema(["reward_x"]))


FUNCTIONS = {"load": load.run, "rollout": rollout.run, "score": short_is_good, "update": update.run}
ORDER = [StageId("load"), *(StageId(name, i) for i in (0, 1) for name in ("rollout", "score", "update"))]


def train(run: RunDir, *, until: int = len(ORDER), fresh_session_each: bool = False) -> dict[str, str]:
    """Runs the first `until` stages; returns the content digest of each."""
    config, found = run.config(), {}
    session = Session()
    for stage in ORDER[:until]:
        if fresh_session_each:
            session.close()
            session = Session()
        found[str(stage)] = execute(run, config, stage, FUNCTIONS[stage.name], session).digest
    session.close()
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[str, str]]:
    run = RunDir.create(tmp_path_factory.mktemp("runs") / "whole", settings())
    return run, train(run)


def test_stages_in_processes_of_their_own_give_the_bytes_of_one_process(
    finished: tuple[RunDir, dict[str, str]], tmp_path: Path
) -> None:
    run = RunDir.create(tmp_path / "run", settings())
    assert train(run, fresh_session_each=True) == finished[1]


def test_a_rollout_killed_in_the_middle_samples_only_what_is_missing_and_ends_equal(
    finished: tuple[RunDir, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    run = RunDir.create(tmp_path / "run", settings())
    train(run, until=1)
    sampled: list[str] = []
    original = Engine.run

    def dies(engine: object, requests: list, *, on_finished, on_step) -> object:  # type: ignore[no-untyped-def]
        def counted(completion) -> None:  # type: ignore[no-untyped-def]
            on_finished(completion)
            sampled.append(completion.completion_id)
            if len(sampled) == 5:
                raise Killed

        return original(engine, requests, on_finished=counted, on_step=on_step)

    monkeypatch.setattr(Engine, "run", dies)
    with pytest.raises(Killed):
        train(run, until=2)
    assert train(run) == finished[1]
    first = [name for name in sampled if name.startswith("00000")]
    assert len(first) == len(set(first)) == 16


def test_an_update_that_fails_half_way_leaves_the_policy_as_it_was_for_the_next_try(
    finished: tuple[RunDir, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir.create(tmp_path / "run", settings())
    config = run.config()
    with Session() as session:
        for stage in ORDER[:6]:
            execute(run, config, stage, FUNCTIONS[stage.name], session)
        with monkeypatch.context() as patch:
            patch.setattr(update, "save_optimizer", lambda *_: (_ for _ in ()).throw(UserError("disk full")))
            with pytest.raises(UserError):
                execute(run, config, ORDER[6], update.run, session)
        assert execute(run, config, ORDER[6], update.run, session).digest == finished[1]["update 1"]


KILLED_AFTER_ITS_FIRST_STEP = """
import os, signal
from stages import update
from stages.artifacts import command
command.print_progress = lambda progress: os.kill(os.getpid(), signal.SIGKILL) if progress.done == 1 else None
update.main()
"""


def test_an_update_killed_after_its_first_step_and_run_again_leaves_the_bytes_of_an_undisturbed_one(
    finished: tuple[RunDir, dict[str, str]], tmp_path: Path
) -> None:
    stage = StageId("update", 1)
    run = RunDir(shutil.copytree(finished[0].path, tmp_path / "run"))
    quiet, folder = finished[0].folder(stage), run.folder(stage)
    shutil.rmtree(folder)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}

    def process(*words: str) -> int:
        command = [sys.executable, *words, "--run-dir", str(run.path), "--iteration", "1"]
        return subprocess.run(command, cwd=ROOT, timeout=PATIENCE_S).returncode

    assert process("-c", KILLED_AFTER_ITS_FIRST_STEP) == -signal.SIGKILL
    assert not folder.exists()
    assert list(folder.parent.glob(".tmp-*"))  # it had begun
    assert {path: path.read_bytes() for path in before} == before
    assert process("-m", "stages.update") == 0
    assert not list(folder.parent.glob(".tmp-*"))
    written = {path.name for path in quiet.iterdir()}
    assert {path.name for path in folder.iterdir()} == written
    assert {"adapter_model.safetensors", "optimizer.safetensors", "state.json"} < written
    for name in written - {"timings.parquet", "manifest.json"}:
        assert (folder / name).read_bytes() == (quiet / name).read_bytes(), name
    mine, theirs = (json.loads((each / "manifest.json").read_text()) for each in (folder, quiet))
    assert mine["key"] == theirs["key"]


def test_the_metrics_say_that_engine_and_trainer_agree_and_what_was_trained(
    finished: tuple[RunDir, dict[str, str]],
) -> None:
    run, _ = finished
    rows = [
        row
        for iteration in (0, 1)
        for row in read_table(run.folder(StageId("update", iteration)), "metrics", METRICS).to_pylist()
    ]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert row["engine_difference_max"] < 1e-4
        assert 0 <= row["engine_kl"] < 1e-9
        assert 0 <= row["routes_differ"] < 1e-4
        assert row["tokens"] > 0
        assert row["grad_norm"] > 0
    # On policy the ratio is exactly 1 at an iteration's first step, and no longer at its second.
    for first, second in (rows[:2], rows[2:]):
        assert first["ratio_min"] == first["ratio_max"] == 1.0
        assert second["ratio_min"] < 1.0 < second["ratio_max"]
    assert rows[0]["kl"] == 0.0  # nothing trained yet: the policy is its own reference
    assert rows[2]["kl"] > 0.0


def test_samples_hold_what_each_completion_was_trained_with(finished: tuple[RunDir, dict[str, str]]) -> None:
    run, _ = finished
    samples = read_table(run.folder(StageId("update", 1)), "samples", SAMPLES).to_pylist()
    rollouts = read_table(run.folder(StageId("rollout", 1)), "rollouts", ROLLOUTS).to_pylist()
    assert [row["completion_id"] for row in samples] == [row["completion_id"] for row in rollouts]
    for sample, completion in zip(samples, rollouts, strict=True):
        assert completion["policy_version"] == 1
        difference = torch.tensor(sample["policy_logprobs"]) - torch.tensor(completion["engine_logprobs"])
        assert difference.abs().max() < 1e-4
        assert len(sample["loss_mask"]) == len(sample["reference_logprobs"]) == completion["num_tokens"]
    for group in (0, 1):
        members = [s["advantage"] for s, r in zip(samples, rollouts, strict=True) if r["group_index"] == group]
        assert sum(members) == pytest.approx(0, abs=1e-6)


def test_a_completion_with_recorded_routes_is_told_without_them(finished: tuple[RunDir, dict[str, str]]) -> None:
    told = json.loads(show.as_json(show.completion(finished[0], "00001-001-003")))
    assert told["completion"]
    assert "routes" not in told


def test_training_moves_the_policy_towards_what_was_rewarded(finished: tuple[RunDir, dict[str, str]]) -> None:
    run, _ = finished
    config = run.config()
    policy = Policy.load(
        config.model, lora_rank=config.update.lora_rank, lora_alpha=config.update.lora_alpha, seed=config.train.seed
    )
    rows = read_table(run.folder(StageId("rollout", 0)), "rollouts", ROLLOUTS).to_pylist()
    advantages = {
        row["completion_id"]: row["advantage"]
        for row in read_table(run.folder(StageId("update", 0)), "samples", SAMPLES).to_pylist()
    }
    samples = [
        Sample(
            completion_id=r["completion_id"],
            prompt_ids=tuple(r["prompt_ids"]),
            completion_ids=tuple(r["completion_ids"]),
            engine_logprobs=(),
            advantage=advantages[r["completion_id"]],
        )
        for r in rows
    ]

    def objective() -> float:
        with torch.no_grad():
            means = [
                float(completion_logprobs(policy, Pack((s,)), temperature=1.0).logprobs.mean()) * s.advantage
                for s in samples
            ]
        return sum(means)

    before = objective()
    policy.load_adapter(run.folder(StageId("update", 0)), version=1)
    assert objective() > before


def test_another_checkpoint_than_the_run_s_own_is_refused(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", settings())
    train(run, until=1)
    path = run.folder(StageId("load")) / "model.json"
    text = path.read_text()
    with Session() as session:
        context = StageContext(
            run=run,
            config=run.config(),
            stage=StageId("rollout", 0),
            out=tmp_path,
            session=session,
            upstream=(StageId("load"),),
        )
        at = text.index('"config.json": "') + len('"config.json": "')
        path.write_text(text[:at] + "0" * 8 + text[at + 8 :])
        with pytest.raises(UserError, match=r"config\.json differs"):
            rollout.run(context)


def test_completions_are_dealt_evenly_and_by_the_seed_alone() -> None:
    dealt = update.deal(10, 3, seed=4)
    assert sorted(i for batch in dealt for i in batch) == list(range(10))
    assert sorted(len(batch) for batch in dealt) == [3, 3, 4]
    assert dealt == update.deal(10, 3, seed=4)
    assert dealt != update.deal(10, 3, seed=5)
    assert len(update.deal(2, 5, seed=0)) == 2
