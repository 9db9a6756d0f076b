"""Early judging: a program is judged while other completions are still being sampled.

    the flow   enable(session), once; without it nothing here does anything
    rollout    early = early_judging(context); early.open(context, task); early.start(...) as each completion ends
    score      early = early_judging(context); judging.judge(..., begun=early.take); early.close()

Only futures are handed over. rollout writes the same with and without it, and a verdict counts from when score has
journalled it: after a kill programs are judged again. Nobody waits here: while the pool's queue is full, programs are
left to score; where the sandbox failed, score asks once more.
"""

import logging
import queue
from concurrent.futures import Future

from stages.artifacts import Session, StageContext
from stages.config import UserError, canonical_json
from stages.sandbox import Job, Result, SandboxPool
from stages.tasks import judging
from stages.tasks.base import Task

ITEM = "early judging"

log = logging.getLogger("stages.early")


class EarlyJudging:
    """The verdicts of one rollout on their way, by what was asked: program, seeds and limits, whoever asked."""

    def __init__(self, *, enabled: bool = False) -> None:
        self.enabled = enabled
        self.pool: SandboxPool | None = None
        self.futures: dict[str, Future[Result]] = {}
        self.done: queue.SimpleQueue[Future[Result]] = queue.SimpleQueue()

    def open(self, context: StageContext, task: Task) -> None:
        """Makes ready for the rollout of `context`. A sandbox that is not to be had is logged: score will need it."""
        self.close()
        if self.enabled:
            self.context, self.task = context, task
            try:
                self.limits = judging.limits_of(context.config.sandbox)
                self.pool = judging.sandbox_of(context, task)
            except UserError as error:
                log.warning("programs are judged after the rollout only: %s", error.message)

    def start(self, completion_id: str, group_index: int, completion: str) -> None:
        """Submits the completion's program, unless the same is on its way or the pool's queue is full."""
        if self.pool is None or self.pool.num_waiting >= judging.max_waiting(self.pool.config):
            return
        attempt = judging.training_attempt(
            self.context, self.task, group_index=group_index, completion_id=completion_id, completion=completion
        )
        if attempt.program is None:
            return
        job = self.task.job(completion_id, attempt.program, attempt.seeds, self.limits)
        question = question_of(job)
        if question not in self.futures:
            self.futures[question] = future = self.pool.submit(job)
            future.add_done_callback(self.done.put)

    def take(self, job: Job) -> "Future[Result] | None":
        """Hands over the future of such a job; None where there is none, or one that will bring no verdict."""
        future = self.futures.pop(question_of(job), None)
        if future is None or (future.done() and (future.cancelled() or future.exception())):
            return None
        return future

    @property
    def figures(self) -> dict[str, float | str]:
        """What a progress says of it: how many programs have been judged, how many wait for a sandbox."""
        return {"judged": self.done.qsize(), "waiting": self.pool.num_waiting} if self.pool is not None else {}

    def close(self) -> None:
        """Cancels and forgets what nobody took; the pool is the session's and stays."""
        for future in self.futures.values():
            future.cancel()
        self.futures.clear()
        self.done = queue.SimpleQueue()
        self.pool = None


def question_of(job: Job) -> str:
    return canonical_json(job.to_message())


def enable(session: Session) -> None:
    """Lets the rollouts of this session have programs judged early."""
    session.get(ITEM, lambda: EarlyJudging(enabled=True))


def early_judging(context: StageContext) -> EarlyJudging:
    """Returns the session's early judging, or one that does nothing where the session has not enabled it."""
    return context.session.find(ITEM) or EarlyJudging()
