"""Many programs judged in the sandbox: what score, evaluate and export share.

A program is judged once for each list of seeds it meets, however many completions hold it: its verdict would be the
same. What the sandbox itself could not do is an exception here, never a score.
"""

import dataclasses
import queue
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from stages.artifacts import StageContext
from stages.config import SandboxConfig, UserError
from stages.sandbox import Job, Limits, Outcome, Result, SandboxPool, open_pool
from stages.tasks import checks
from stages.tasks.base import Score, Task

MAX_WAITING = 32  # jobs in the queue for each container: none of them idles, and few programs are held twice
CHEATS = (Outcome.cheat, Outcome.foreign_import)


class Attempt(NamedTuple):
    """A program to be judged on seeds; None where a completion holds no program.

    Example: Attempt("00003-002-005", "def strategy(board): ...", (4, 18, 6, 2))
    """

    attempt_id: str
    program: str | None
    seeds: tuple[int, ...]


def limits_of(config: SandboxConfig) -> Limits:
    """Returns the limits of one job.

    The wall clock is a net far behind the CPU's: a verdict must not depend on how busy the machine is.
    """
    wall_s = min(7200.0, 60.0 + 20 * config.cpu_s)
    try:
        return Limits(cpu_s=config.cpu_s, wall_s=wall_s, memory_bytes=config.memory_bytes)
    except ValueError as error:
        raise UserError(str(error), "change sandbox.cpu_s or sandbox.memory_bytes") from None


def sandbox_of(context: StageContext, task: Task) -> SandboxPool:
    """Returns the session's pool of sandboxes, opened when first asked for.

    Where the session has "sandboxes", a folder with their sockets, the pool is of those.
    """
    return context.session.get(
        "sandbox",
        lambda: open_pool(
            context.config.sandbox,
            harnesses={task.name: task.harness_source()},
            labels=context.run.labels(),
            sockets=context.session.find("sandboxes"),
        ),
    )


def training_attempt(
    context: StageContext, task: Task, *, group_index: int, completion_id: str, completion: str
) -> Attempt:
    """Returns how a completion of this iteration is judged: all of a group meet the same hidden seeds."""
    assert context.stage.index is not None
    seeds = task.training_seeds(context.config.train.seed, context.stage.index, group_index)
    return Attempt(completion_id, task.extract(completion), tuple(seeds))


def max_waiting(config: SandboxConfig) -> int:
    """Returns how many jobs may wait in the pool's queue before whoever submits has to wait."""
    return MAX_WAITING * config.containers


def judge(
    attempts: Sequence[Attempt],
    *,
    task: Task,
    pool: SandboxPool,
    limits: Limits,
    on_score: Callable[[Attempt, Score], None] | None = None,
    begun: Callable[[Job], "Future[Result] | None"] = lambda job: None,
) -> list[Score]:
    """Returns the scores of the attempts in their order; `on_score` hears of each at once, on the caller's thread.

    begun(job): the future of a job that asks the same and is in the pool already, which is then not submitted again.
    Of the others no more are submitted than the pool's queue may hold; the rest follow as verdicts come in.
    Errors: SandboxError when the sandbox failed repeatedly; attempts already heard of stand.
    """
    scores: dict[str, Score] = {}

    def settle(same: Sequence[Attempt], result: Result | None) -> None:
        score = dataclasses.replace(task.score(result), checks=checks.columns_of(result))
        for attempt in same:
            scores[attempt.attempt_id] = score
            if on_score is not None:
                on_score(attempt, score)

    alike: dict[tuple[str, tuple[int, ...]], list[Attempt]] = {}
    for attempt in attempts:
        if attempt.program is None:
            settle([attempt], None)
        else:
            alike.setdefault((attempt.program, attempt.seeds), []).append(attempt)
    running: dict[Future[Result], list[Attempt]] = {}
    done: queue.SimpleQueue[Future[Result]] = queue.SimpleQueue()

    def follow(future: Future[Result], same: list[Attempt]) -> None:
        running[future] = same
        future.add_done_callback(done.put)

    rest: deque[tuple[Job, list[Attempt]]] = deque()
    try:
        for (program, seeds), same in alike.items():
            job = task.job(same[0].attempt_id, program, seeds, limits)
            future = begun(job)
            if future is None:
                rest.append((job, same))
            else:
                follow(future, same)
        failure: BaseException | None = None
        while failure is None and (running or rest):
            while rest and (not running or pool.num_waiting < max_waiting(pool.config)):
                job, same = rest.popleft()
                follow(pool.submit(job), same)
            future = done.get()
            while True:  # what is done already is kept, even where one of them failed
                same = running.pop(future)
                error = future.exception()
                if error is None:
                    settle(same, future.result())
                failure = failure or error
                try:
                    future = done.get_nowait()
                except queue.Empty:
                    break
        if failure is not None:
            raise failure
    finally:
        for future in running:
            future.cancel()
    return [scores[attempt.attempt_id] for attempt in attempts]


def held_out(programs: Sequence[tuple[str, str | None]], *, task: Task, games: int) -> list[Attempt]:
    """Returns attempts for (id, program) pairs: the n-th program meets the same `games` seeds in every evaluation.

    No two programs share a seed, so that an interval over programs holds the luck of the games too.
    """
    seeds = task.held_out_seeds(len(programs) * games)
    return [
        Attempt(name, program, tuple(seeds[index * games : (index + 1) * games]))
        for index, (name, program) in enumerate(programs)
    ]


def play_held_out(
    programs: Sequence[str | None], *, task: Task, pool: SandboxPool, limits: Limits, games: int
) -> list[Score]:
    """Returns the scores of programs on seeds that no training uses, `games` each."""
    named = [(f"held-out-{index:05d}", program) for index, program in enumerate(programs)]
    return judge(held_out(named, task=task, games=games), task=task, pool=pool, limits=limits)


def figures(scores: Sequence[Score], *, task: Task) -> dict[str, float]:
    """Returns the task's held-out figures of one program; as of no case where it cheated, whatever its cases say."""
    if any(score.outcome in CHEATS for score in scores):
        return task.measure([])
    return task.measure([case for score in scores for case in score.cases])


def to_record(score: Score) -> dict[str, Any]:
    """Returns the score as a journal keeps it."""
    return {
        "outcome": str(score.outcome),
        "rewards": dict(score.rewards),
        "cases": [dict(case) for case in score.cases],
        "detail": score.detail,
        "checks": dict(score.checks),
    }


def from_record(record: Mapping[str, Any]) -> Score:
    """Returns the score that to_record() wrote."""
    return Score(
        Outcome(record["outcome"]), record["rewards"], record["cases"], record["detail"], record.get("checks", {})
    )
