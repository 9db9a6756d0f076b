"""matmul through the stages: score, evaluate, and what inspect, report and the summary say of it."""

import re
from typing import ClassVar

import pytest

from flows.summary import Summary
from stages import evaluate, export, score
from stages.artifacts import RunDir, Session, StageId, execute
from stages.artifacts.parquet import EVALUATIONS, ROLLOUTS, SCORES, SUMMARY, read_table, write_parts
from stages.config import EvaluateConfig, RunConfig, TaskConfig, TrainConfig
from stages.engine import Completion
from stages.report import games, training
from stages.report.collect import collect
from stages.report.page import render
from stages.runs import show, tables
from stages.tasks import registry
from stages.tasks.matmul.baselines import BASELINES
from tests.program_pipes import PipePool

FINAL = "<|channel|>final<|message|>"
LOOPS, FAST, SLOW = (
    f"{FINAL}```python\n{BASELINES[name]}```<|return|>" for name in ("three_loops", "four_rows", "indexed_sum")
)
WRONG = FINAL + "```python\ndef matmul(A, B):\n    return A\n```<|return|>"
BROKEN = FINAL + "```python\ndef matmul(A, B:\n```<|return|>"
CUT_SHORT = FINAL + "```python\ndef matmul(A, B):\n    return ["
COMPLETIONS = [LOOPS, FAST, WRONG, BROKEN, CUT_SHORT, LOOPS, SLOW, WRONG]
LEFTOVERS = re.compile(r"\b(games?|tiles?|2048|moves|won|played?|points|strategy)\b", re.IGNORECASE)
OPTIONS = (("cases", 2), ("smallest", 8), ("largest", 10), ("trials", 2))
CONFIG = RunConfig(
    task=TaskConfig(name="matmul", options=OPTIONS),
    train=TrainConfig(iterations=1),
    evaluate=EvaluateConfig(programs=len(COMPLETIONS), games=2),
)


class Policy:
    stop_token_ids = (0,)
    version = 0

    def render(self, messages):
        assert "matmul(A" in messages[0]["content"]
        return (1, 2, 3)

    def decode(self, ids):
        return COMPLETIONS[ids[0]]


class Engine:
    """Answers with the recorded completions."""

    kwargs: ClassVar[set] = {"max_slots", "max_new_tokens", "cache_bytes"}

    def __init__(self, policy, **options):
        assert set(options) <= self.kwargs
        self.policy = policy

    def close(self):
        pass

    def run(self, requests, *, on_finished=None, on_step=None):
        done = []
        for request in requests:
            done.append(
                Completion(
                    completion_id=request.completion_id,
                    prompt_ids=request.prompt_ids,
                    completion_ids=(int(request.completion_id[-4:]),),
                    engine_logprobs=(0.0,),
                    finish_reason="stop",
                    seed=request.sampling.seed,
                )
            )
            if on_finished:
                on_finished(done[-1])
        return done


def pool(**options):
    return PipePool(registry.of(CONFIG).harness_source(), **options)


def rollout(context):
    rows = [
        {
            "completion_id": f"00000-000-{number:03d}",
            "prompt_id": "00000-000",
            "group_index": 0,
            "sample_index": number,
            "iteration": 0,
            "policy_version": 0,
            "task": "matmul",
            "prompt": "",
            "completion": completion,
            "prompt_ids": [1],
            "completion_ids": [2],
            "engine_logprobs": [-0.5],
            "finish_reason": "stop",
            "seed": 1,
            "num_tokens": 1,
        }
        for number, completion in enumerate(COMPLETIONS)
    ]
    write_parts(context.out, "rollouts", rows, ROLLOUTS)


def run_stage(run, stage, function, sandbox=None):
    session = Session()
    session.get("sandbox", lambda: sandbox)
    execute(run, CONFIG, stage, function, session)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(evaluate, "live_engine", lambda context, policy: Engine(policy, max_slots=1, max_new_tokens=1))
    patch.setattr(export, "Engine", Engine)
    patch.setattr(evaluate, "live_policy", lambda context, version: Policy())
    run = RunDir.create(tmp_path_factory.mktemp("matmul") / "demo", CONFIG)
    run_stage(run, StageId("load"), lambda context: (context.out / "x").write_text("x"))
    run_stage(run, StageId("rollout", 0), rollout)
    run_stage(run, StageId("score", 0), score.run, pool())
    run_stage(run, StageId("evaluate", 0), evaluate.run, pool())
    patch.undo()
    return run


def scores(run):
    return read_table(run.folder(StageId("score", 0)), "scores", SCORES).to_pylist()


def test_scores_hold_four_rewards_and_the_cases_of_the_task(run):
    rows = scores(run)
    rewards = ("reward_works", "reward_no_cheating", "reward_correctness", "reward_speed")
    for row in rows:
        assert row["reward"] == pytest.approx(sum(row[name] for name in rewards))
    assert [row["outcome"] for row in rows] == ["ok", "ok", "ok", "syntax_error", "no_program", "ok", "ok", "ok"]
    assert [row["reward_correctness"] for row in rows] == [3, 3, 0, 0, 0, 3, 3, 0]
    assert [row["reward"] for row in rows[2:5]] == [1.0, -1.0, -1.0]
    assert [len(row["cases"]) for row in rows] == [2, 2, 2, 0, 0, 2, 2, 2]
    assert rows[0]["cases"][0].keys() == registry.of(CONFIG).case_columns.keys()
    assert "games" not in rows[0]


def test_completions_that_are_alike_share_one_measurement(run):
    rows = scores(run)
    assert rows[0]["cases"] == rows[5]["cases"]


def test_speeds_are_journalled_once_and_never_measured_again(tmp_path):
    run = RunDir.create(tmp_path / "killed", CONFIG)
    run_stage(run, StageId("load"), lambda context: (context.out / "x").write_text("x"))
    run_stage(run, StageId("rollout", 0), rollout)
    first, measured = pool(fail_after=2), {}
    task = registry.of(CONFIG)
    with pytest.raises(RuntimeError, match="broke"):
        run_stage(run, StageId("score", 0), score.run, first)
    for job in first.jobs:
        measured[job.program] = None
    second = pool()
    run_stage(run, StageId("score", 0), score.run, second)
    assert not {job.program for job in second.jobs} & set(measured)
    assert {row["program"] for row in scores(run) if row["program"]} == set(measured) | {
        job.program for job in second.jobs
    }
    digest = run.manifest(StageId("score", 0)).digest
    run_stage(run, StageId("score", 0), score.run, pool(fail_after=0))
    assert run.manifest(StageId("score", 0)).digest == digest
    assert all(case["speedup"] for row in scores(run) if row["reward_correctness"] for case in row[task.cases])


def test_the_evaluation_measures_speed_and_right_programs_and_has_no_column_of_2048(run):
    folder = run.folder(StageId("evaluate", 0))
    rows = read_table(folder, "evaluations", EVALUATIONS).to_pylist()
    assert [row["right"] for row in rows[:8]] == [1, 1, 0, 0, 0, 1, 1, 0]
    for row in rows[:8]:
        speeds = [case["speedup"] for case in row["cases"]]
        assert row["mean_speedup"] == pytest.approx(sum(speeds) / len(speeds) if row["right"] else 0.0)
    assert [row["name"] for row in rows[8:]] == list(BASELINES)
    policy, *baselines = read_table(folder, "summary", SUMMARY).to_pylist()
    assert policy["right"] == pytest.approx(0.5)
    assert policy["mean_speedup"] == pytest.approx(sum(row["mean_speedup"] for row in rows[:8]) / 8)
    assert (policy["cases"], policy["programs"]) == (12, 8)
    assert [row["cases"] for row in baselines] == [16] * len(BASELINES)
    assert not [name for name in policy if re.search("score|win|tiles|games", name)]
    by_name = {row["name"]: row for row in baselines}
    assert by_name["three_loops"]["right"] == by_name["four_rows"]["right"] == 1.0
    assert by_name["four_rows"]["mean_speedup"] > by_name["indexed_sum"]["mean_speedup"]


def test_the_export_is_compared_by_the_task_s_own_figure(run, monkeypatch):
    monkeypatch.setattr(export, "engine_of", lambda config, policy: Engine(policy))

    class Context:
        config = CONFIG
        session = Session()

        def input(self, stage):
            return run.folder(stage)

    Context.session.get("sandbox", pool)
    before = export.evaluated_score(Context(), 0)
    assert before == read_table(run.folder(StageId("evaluate", 0)), "summary", SUMMARY)["mean_speedup"][0].as_py()
    assert export.held_out_score(Policy(), Context()) == pytest.approx(before, rel=0.7)


def test_the_terminal_speaks_of_speed_and_right_programs(run, capsys):
    (line,) = [line for line in Summary.of(run).lines() if line.startswith("untrained")]
    assert re.fullmatch(
        r"untrained\s+speed-up \d\.\d\d \[\d\.\d\d, \d\.\d\d\], right 50\.0 %, 4 distinct of 8 programs", line
    )
    assert "speed-up" in Summary.of(run).markdown()
    tables.print_answer(run, show.overview(run))
    tables.print_completion(show.completion(run, "00000-000-001"), task=registry.of(CONFIG), whole=False)
    tables.print_completion(show.completion(run, "e00000-0002"), task=registry.of(CONFIG), whole=True)
    text = capsys.readouterr().out
    for words in ("held-out cases", "speed-up", "four rows", "baseline ms", "correctness 3.00", "right 0 %"):
        assert words in text
    assert not LEFTOVERS.search(text), LEFTOVERS.search(text)


def test_the_report_speaks_of_speed_and_right_programs(run):
    contents = collect(run.path)
    text = "".join(
        section(contents)
        for section in (training.header, training.learning, games.held_out, games.replays, games.programs)
    )
    for words in ("Speed-up", "On cases it never saw", "times as fast as three loops", "four rows", "Right", "Cases"):
        assert words in text
    visible = re.sub(r"<[^>]*>", " ", text)
    assert not LEFTOVERS.search(visible), LEFTOVERS.search(visible)
    assert "Speed-up" in render(contents)
