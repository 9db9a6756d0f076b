"""The evaluation over recorded completions: what is counted, that intervals are right, that a killed one goes on."""

import hashlib
import statistics
from typing import ClassVar

import numpy as np
import pytest

from stages import evaluate
from stages.artifacts import RunDir, Session, StageId, execute
from stages.artifacts.parquet import EVALUATIONS, SUMMARY, read_table
from stages.config import EvaluateConfig, RunConfig, SandboxConfig, TaskConfig
from stages.engine import Completion
from stages.tasks import judging, registry
from tests.program_pipes import PipePool

FINAL = "<|channel|>final<|message|>"
FIXED = FINAL + "```python\ndef strategy(board):\n    return 'AWDS'[sum(map(sum, board)) // 2 % 4]\n```<|return|>"
SAME_BUT_SPACED = FIXED.replace("(board):", "( board ):  # as above")
QUITS = FINAL + "```python\ndef strategy(board):\n    return None\n```<|return|>"
BROKEN = FINAL + "```python\ndef strategy(board:\n```<|return|>"
CUT_SHORT = FINAL + "```python\ndef strategy(board):\n    return 'A'"
RECORDED = [FIXED, QUITS, SAME_BUT_SPACED, BROKEN, FIXED, CUT_SHORT, FIXED, QUITS, FIXED, FIXED, BROKEN, FIXED]
ZERO = StageId("evaluate", 0)


class Policy:
    stop_token_ids = (0,)

    def render(self, messages):
        assert "strategy(board" in messages[0]["content"]
        return (1, 2, 3)

    def decode(self, ids):
        return RECORDED[ids[0]]


class Engine:
    """Answers with the recorded completions, and dies after `lives` of them."""

    lives = 1000
    sampled: ClassVar[list] = []

    def run(self, requests, *, on_finished=None, on_step=None):
        for request in requests:
            if Engine.lives == 0:
                raise KeyboardInterrupt
            Engine.lives -= 1
            Engine.sampled.append((request.completion_id, request.sampling.seed))
            number = int(request.completion_id[-4:])
            on_finished(
                Completion(
                    completion_id=request.completion_id,
                    prompt_ids=request.prompt_ids,
                    completion_ids=(number,),
                    engine_logprobs=(0.0,),
                    finish_reason="stop",
                    seed=request.sampling.seed,
                )
            )


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    monkeypatch.setattr(evaluate, "live_policy", lambda context, version: Policy())
    monkeypatch.setattr(evaluate, "live_engine", lambda context, policy: Engine())
    monkeypatch.setattr(Engine, "lives", 1000)
    monkeypatch.setattr(Engine, "sampled", [])


def prepared(folder):
    config = RunConfig(
        task=TaskConfig(options=(("max_moves", 40), ("target", 64))),
        sandbox=SandboxConfig(containers=2, cpu_s=3.0),
        evaluate=EvaluateConfig(programs=len(RECORDED), games=3),
    )
    run = RunDir.create(folder, config)
    with Session() as session:
        execute(run, config, StageId("load"), lambda context: (context.out / "x").write_text("x"), session)
    return run, config


def pipes(config, **options):
    return PipePool(registry.of(config).harness_source(), **options)


def evaluated(run, config, pool, report=lambda progress: None):
    session = Session()
    session.get("sandbox", lambda: pool)
    execute(run, config, ZERO, evaluate.run, session, report)
    folder = run.folder(ZERO)
    rows = read_table(folder, "evaluations", EVALUATIONS).to_pylist()
    summary = {row["name"]: row for row in read_table(folder, "summary", SUMMARY).to_pylist()}
    return rows, summary


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(evaluate, "live_policy", lambda context, version: Policy())
    patch.setattr(evaluate, "live_engine", lambda context, policy: Engine())
    run, config = prepared(tmp_path_factory.mktemp("run"))
    rows, summary = evaluated(run, config, pipes(config))
    patch.undo()
    return run, config, rows, summary


def test_there_is_a_row_for_each_program_and_each_baseline(done):
    _, _, rows, summary = done
    assert [row["completion_id"] for row in rows[:12]] == [f"e00000-{number:04d}" for number in range(12)]
    assert [row["completion"] for row in rows[:12]] == RECORDED
    assert [(row["kind"], row["name"]) for row in rows[12:]] == [
        ("baseline", name) for name in ("random", "fixed_order", "greedy", "look_ahead")
    ]
    assert list(summary) == ["policy 0", "random", "fixed_order", "greedy", "look_ahead"]


def test_every_program_plays_its_own_held_out_seeds_and_the_baselines_the_same(done):
    _, _, rows, _ = done
    seeds = registry.get("game2048").held_out_seeds(36)
    for number, row in enumerate(rows[:12]):
        if row["outcome"] == "ok":
            assert [game["seed"] for game in row["games"]] == seeds[3 * number : 3 * number + 3]
    assert [game["seed"] for game in rows[12]["games"]] == seeds
    task = registry.get("game2048")
    trained = {
        seed for iteration in range(30) for group in range(4) for seed in task.training_seeds(0, iteration, group)
    }
    assert not trained & set(seeds)


def test_the_means_are_those_of_the_games_and_failures_count_as_zero(done):
    _, _, rows, summary = done
    means = []
    for row in rows[:12]:
        scores = [game["score"] for game in row["games"]]
        means.append(statistics.mean(scores) if scores else 0.0)
        assert row["mean_score"] == pytest.approx(means[-1])
    assert [row["mean_score"] for row in rows[:12] if row["outcome"] != "ok"] == [0, 0, 0]
    assert summary["policy 0"]["mean_score"] == pytest.approx(statistics.mean(means))
    wins = [game["state"] == "won" for game in rows[15]["games"]]
    assert summary["look_ahead"]["win_rate"] == pytest.approx(statistics.mean(wins))


def test_distinct_programs_are_counted_by_their_syntax_and_those_that_do_not_parse_are_not(done):
    _, _, rows, summary = done
    assert summary["policy 0"]["programs"] == 12
    assert summary["policy 0"]["distinct_programs"] == 2
    assert rows[0]["syntax_tree"] == rows[2]["syntax_tree"] != rows[1]["syntax_tree"]
    assert rows[3]["syntax_tree"] is rows[5]["syntax_tree"] is None


def test_the_histogram_holds_every_game_under_its_largest_tile(done):
    _, _, rows, summary = done
    for name in summary:
        games = [game for row in rows if row["name"] == name for game in row["games"]]
        tiles = {entry["tile"]: entry["games"] for entry in summary[name]["tiles"]}
        assert tiles == {tile: sum(game["max_tile"] == tile for game in games) for tile in tiles}
        assert sum(tiles.values()) == summary[name]["games"] == len(games)


def test_the_interval_agrees_with_the_normal_one_and_has_its_mean_inside():
    values = np.random.default_rng(3).gamma(2.0, 500.0, size=64)
    low, high = np.mean(values) - 1.96 * np.std(values) / 8, np.mean(values) + 1.96 * np.std(values) / 8
    interval = evaluate.bootstrap(values.tolist(), seed=1)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(low, rel=0.05)
    assert interval.high == pytest.approx(high, rel=0.05)
    assert evaluate.bootstrap(values.tolist(), seed=1) == interval
    assert evaluate.bootstrap([7.0] * 5, seed=1) == (7.0, 7.0, 7.0)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    draw = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = evaluate.bootstrap(draw.normal(10, 4, size=64).tolist(), seed=trial)
        covered += interval.low <= 10 <= interval.high
    assert 175 <= covered <= 199


def test_the_interval_of_the_policy_is_over_programs_not_games(done):
    _, _, rows, summary = done
    expected = evaluate.bootstrap(
        [row["mean_score"] for row in rows[:12]],
        seed=evaluate.derive("bootstrap", "score", "policy 0"),
    )
    row = summary["policy 0"]
    assert (row["mean_score_low"], row["mean_score_high"]) == (expected.low, expected.high)
    assert row["mean_score_low"] < row["mean_score"] < row["mean_score_high"]


def test_a_cheat_scores_nothing_whatever_its_games_say():
    task = registry.get("game2048")
    games = [{"seed": 1, "moves": 5, "max_tile": 2048, "score": 20000, "state": "won", "letters": ""}]
    result = judging.Result(job_id="", outcome=judging.Outcome.cheat, detail="", cases=tuple(games), cpu_s=0, wall_s=0)
    row = evaluate.measured("x", [task.score(result)], task)
    assert (row["outcome"], row["mean_score"], row["win_rate"]) == ("cheat", 0, 0)


@pytest.mark.parametrize("lives", [0, 5, 11])
def test_an_evaluation_killed_while_sampling_samples_only_the_rest(tmp_path, done, lives, monkeypatch):
    run, config = prepared(tmp_path)
    monkeypatch.setattr(Engine, "lives", lives)
    with pytest.raises(KeyboardInterrupt):
        evaluated(run, config, pipes(config))
    monkeypatch.setattr(Engine, "lives", 1000)
    evaluated(run, config, pipes(config))
    names = [name for name, _ in Engine.sampled]
    assert sorted(names) == [f"e00000-{number:04d}" for number in range(12)]
    assert run.manifest(ZERO).digest == done[0].manifest(ZERO).digest


def test_an_evaluation_killed_while_judging_judges_only_the_rest_and_ends_with_the_same_bytes(tmp_path, done):
    run, config = prepared(tmp_path)
    with pytest.raises(RuntimeError, match="broke"):
        evaluated(run, config, pipes(config, fail_after=20))
    assert not run.folder(ZERO).exists()
    pool = pipes(config)
    evaluated(run, config, pool)
    assert (
        len(pool.jobs) == 11 + 4 * 12 - 20
    )  # one of the twelve has no program; each baseline plays 36 games by threes
    assert len(Engine.sampled) == 12
    assert run.manifest(ZERO).digest == done[0].manifest(ZERO).digest


def test_programs_are_sampled_with_seeds_that_only_the_run_decides(tmp_path, done):
    run, config = prepared(tmp_path)
    evaluated(run, config, pipes(config))
    seeds = dict(Engine.sampled)
    assert len(set(seeds.values())) == 12


def test_progress_ends_with_all_completions_and_all_programs(tmp_path):
    run, config = prepared(tmp_path)
    seen = []
    evaluated(run, config, pipes(config), seen.append)
    assert ("completions", 12, 12) in {(progress.unit, progress.done, progress.total) for progress in seen}
    assert (seen[-1].unit, seen[-1].done, seen[-1].total) == ("programs", 60, 60)


def test_play_held_out_gives_what_the_evaluation_gave(done):
    _, config, rows, _ = done
    task = registry.of(config)
    scores = judging.play_held_out(
        [row["program"] for row in rows[:12]],
        task=task,
        pool=pipes(config),
        limits=judging.limits_of(config.sandbox),
        games=3,
    )
    assert [list(score.cases) for score in scores] == [row["games"] for row in rows[:12]]


@pytest.mark.docker
def test_an_evaluation_in_real_sandboxes_gives_what_the_pipes_gave(tmp_path, done):
    run, config = prepared(tmp_path / "once")
    with Session() as session:
        execute(run, config, ZERO, evaluate.run, session)
    rows = read_table(run.folder(ZERO), "evaluations", EVALUATIONS).to_pylist()
    for row, same in zip(rows, done[2], strict=True):
        assert row == same
    digest = hashlib.sha256((run.folder(ZERO) / "evaluations-00000.parquet").read_bytes()).hexdigest()
    again, config = prepared(tmp_path / "again")
    with Session() as session:
        execute(again, config, ZERO, evaluate.run, session)
    assert hashlib.sha256((again.folder(ZERO) / "evaluations-00000.parquet").read_bytes()).hexdigest() == digest
