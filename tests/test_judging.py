"""Judging many programs: backpressure, and scoring that begins while completions are still being sampled."""

import logging
from collections import deque
from concurrent.futures import Future
from pathlib import Path

import pytest

from flows.config import overridden
from flows.presets import preset
from stages import load, rollout, score
from stages.artifacts import Manifest, Progress, RunDir, Session, StageContext, StageId, execute
from stages.bench.score import Watched
from stages.config import RunConfig, SandboxConfig, TaskConfig
from stages.sandbox import Job, Outcome, Result, SandboxError, open_pool
from stages.tasks import early, judging, registry
from stages.tasks.judging import Attempt

TASK = registry.get("game2048", {"games": 1})
LIMITS = judging.limits_of(SandboxConfig())
ROLLOUT, SCORE = StageId("rollout", 0), StageId("score", 0)


class HeldPool:
    """A pool that finishes nothing by itself: `finish()` ends the job that has waited longest."""

    def __init__(self, *, containers: int = 1, finish_when: int = 10**9) -> None:
        self.config = SandboxConfig(containers=containers)
        self.finish_when = finish_when
        self.jobs: list[Job] = []
        self.most_waiting = 0
        self.held: deque[tuple[Job, Future[Result]]] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self.held)

    def submit(self, job: Job) -> "Future[Result]":
        future: Future[Result] = Future()
        self.jobs.append(job)
        self.held.append((job, future))
        self.most_waiting = max(self.most_waiting, len(self.held))
        if len(self.held) >= self.finish_when:
            self.finish()
        return future

    def finish(self, error: Exception | None = None) -> None:
        job, future = self.held.popleft()
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(Result(job_id=job.job_id, outcome=Outcome.ok, detail=job.program, cases=()))


def attempts(count: int) -> list[Attempt]:
    return [Attempt(f"{number:03d}", f"# {number}", (number,)) for number in range(count)]


def context_of(folder: Path, session: Session, **sandbox: int) -> StageContext:
    config = RunConfig(task=TaskConfig(options=(("games", 1),)), sandbox=SandboxConfig(**sandbox))
    run = RunDir.create(folder / "run", config)
    return StageContext(run=run, config=config, stage=ROLLOUT, out=folder, session=session)


def completion(number: int) -> str:
    return f"<|channel|>final<|message|>```python\ndef strategy(board):\n    return {number}\n```<|return|>"


@pytest.fixture
def opened(tmp_path: Path) -> "tuple[early.EarlyJudging, HeldPool, StageContext]":
    """Early judging that is ready for a rollout, over a pool that holds its jobs."""
    session, pool = Session(), HeldPool()
    early.enable(session)
    session.get("sandbox", lambda: pool)
    context = context_of(tmp_path, session)
    judge = early.early_judging(context)
    judge.open(context, TASK)
    return judge, pool, context


def test_the_pools_queue_never_holds_more_than_its_bound_and_every_attempt_is_scored_in_order() -> None:
    pool = HeldPool(containers=2, finish_when=2 * judging.MAX_WAITING)
    heard: list[str] = []

    def on_score(attempt: Attempt, _: object) -> None:
        heard.append(attempt.attempt_id)
        while pool.held and len(pool.jobs) == 200:  # nothing more is submitted that would finish them
            pool.finish()

    scores = judging.judge(attempts(200), task=TASK, pool=pool, limits=LIMITS, on_score=on_score)
    assert pool.most_waiting == 2 * judging.MAX_WAITING < len(pool.jobs) == 200
    assert [score.detail for score in scores] == [f"# {number}" for number in range(200)]
    assert sorted(heard) == [f"{number:03d}" for number in range(200)]


def test_a_failure_of_the_sandbox_is_raised_after_the_verdicts_that_are_there_and_the_rest_is_cancelled() -> None:
    pool = HeldPool()
    heard: list[str] = []

    def submit(job: Job) -> "Future[Result]":
        future = HeldPool.submit(pool, job)
        if len(pool.jobs) == 5:
            pool.finish()
            pool.finish(SandboxError("no container would start"))
            pool.finish()
        return future

    pool.submit = submit  # type: ignore[method-assign]
    with pytest.raises(SandboxError, match="no container would start"):
        judging.judge(
            attempts(5), task=TASK, pool=pool, limits=LIMITS, on_score=lambda each, _: heard.append(each.attempt_id)
        )
    assert heard == ["000", "002"]
    assert all(future.cancelled() for _, future in pool.held)


def test_a_completion_is_submitted_as_it_ends_and_score_takes_that_very_future(opened) -> None:
    judge, pool, context = opened
    judge.start("00000-000-000", 0, completion(0))
    assert len(pool.jobs) == 1
    again = judging.training_attempt(
        context, TASK, completion_id="00000-000-000", group_index=0, completion=completion(0)
    )
    assert again.program is not None
    job = TASK.job("whatever name", again.program, again.seeds, LIMITS)
    assert job.cases == pool.jobs[0].cases
    pool.finish()
    future = judge.take(job)
    assert future is not None
    assert future.result().job_id == "00000-000-000"
    assert judge.take(job) is None


def test_the_same_program_in_a_group_is_submitted_once_and_in_another_group_again(opened) -> None:
    judge, pool, _ = opened
    for number in range(3):
        judge.start(f"00000-000-{number:03d}", 0, completion(7))
    judge.start("00000-001-000", 1, completion(7))
    judge.start("00000-001-001", 1, "no program at all")
    assert len(pool.jobs) == 2


def test_other_limits_or_seeds_are_another_question(opened) -> None:
    judge, pool, _ = opened
    judge.start("00000-000-000", 0, completion(0))
    (job,) = pool.jobs
    other_limits = judging.limits_of(SandboxConfig(cpu_s=3.0))
    assert judge.take(TASK.job("x", job.program, [case["seed"] for case in job.cases], other_limits)) is None
    assert judge.take(TASK.job("x", job.program, [2], LIMITS)) is None
    assert judge.take(TASK.job("x", job.program, [case["seed"] for case in job.cases], LIMITS)) is not None


def test_a_full_queue_is_never_waited_for_and_what_it_had_no_place_for_is_left_to_score(opened) -> None:
    judge, pool, context = opened
    num = judging.MAX_WAITING + 5
    for number in range(num):
        judge.start(f"00000-000-{number:03d}", 0, completion(number))
    assert len(pool.jobs) == judging.MAX_WAITING
    while pool.held:
        pool.finish()
    assert judge.figures["judged"] == judging.MAX_WAITING
    rest = [
        judging.training_attempt(context, TASK, completion_id=str(n), group_index=0, completion=completion(n))
        for n in range(num)
    ]
    pool.finish_when = 1
    scores = judging.judge(rest, task=TASK, pool=pool, limits=LIMITS, begun=judge.take)
    assert len(scores) == len(pool.jobs) == num


def test_what_the_sandbox_could_not_do_early_is_asked_once_more(opened) -> None:
    judge, pool, context = opened
    judge.start("00000-000-000", 0, completion(0))
    pool.finish(SandboxError("the daemon was away"))
    pool.finish_when = 1
    attempt = judging.training_attempt(context, TASK, completion_id="a", group_index=0, completion=completion(0))
    (score_,) = judging.judge([attempt], task=TASK, pool=pool, limits=LIMITS, begun=judge.take)
    assert score_.outcome is Outcome.ok
    assert len(pool.jobs) == 2


def test_the_next_rollout_forgets_and_cancels_what_nobody_took(opened) -> None:
    judge, pool, context = opened
    judge.start("00000-000-000", 0, completion(0))
    judge.open(context, TASK)
    assert pool.held[0][1].cancelled()
    assert judge.figures["judged"] == 0
    judge.start("00000-000-000", 0, completion(0))
    assert len(pool.jobs) == 2


def test_a_session_that_has_not_enabled_it_opens_no_sandbox_and_hands_nothing_over(tmp_path: Path) -> None:
    session = Session()
    context = context_of(tmp_path, session)
    judge = early.early_judging(context)
    judge.open(context, TASK)
    judge.start("00000-000-000", 0, completion(0))
    assert session.find("sandbox") is None
    assert judge.figures == {}
    assert judge.take(TASK.job("x", "", [2], LIMITS)) is None


def test_a_rollout_goes_on_without_a_sandbox_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    session = Session()
    early.enable(session)
    context = context_of(tmp_path, session)
    judge = early.early_judging(context)
    with caplog.at_level(logging.WARNING):
        judge.open(context, TASK)
        judge.start("00000-000-000", 0, completion(0))
    assert "after the rollout only: no Docker daemon answers" in caplog.text


@pytest.mark.docker
def test_a_rollout_whose_programs_are_judged_meanwhile_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """The bundled model, real sandboxes; without the hook, and with it."""
    config = overridden(preset("tiny_test"), ["rollout.max_new_tokens=128", "train.iterations=1"])
    made: dict[bool, list[Manifest]] = {}
    for hooked in (False, True):
        run = RunDir.create(tmp_path / f"run-{hooked}", config)
        task = registry.of(config)
        harnesses = {task.name: task.harness_source()}
        seen: list[tuple[int, int]] = []
        with open_pool(config.sandbox, harnesses=harnesses, labels=run.labels()) as pool, Session() as session:
            watched = Watched(pool)
            if hooked:
                early.enable(session)
            session.get("sandbox", lambda watched=watched: watched)

            def report(progress: Progress, watched: Watched = watched, seen: list[tuple[int, int]] = seen) -> None:
                seen.append((progress.done, len(watched.futures)))

            execute(run, config, StageId("load"), load.run, session)
            rolled = execute(run, config, ROLLOUT, rollout.run, session, report)
            submitted = len(watched.futures)
            scored = execute(run, config, SCORE, score.run, session)
            made[hooked] = [rolled, scored]
            total = config.rollout.prompts * config.rollout.group_size
            if hooked:
                assert submitted == len(watched.futures) > 0, "score submitted again what was on its way"
                assert any(jobs for done, jobs in seen if done < total), "nothing was judged before the last one ended"
                assert not early.early_judging(context_of(tmp_path, session)).futures
            else:
                assert submitted == 0 < len(watched.futures)
    assert [manifest.digest for manifest in made[True]] == [manifest.digest for manifest in made[False]]
