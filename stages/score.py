"""score: runs the program of every completion in a sandbox and writes its rewards.

    python -m stages.score --run-dir R --iteration 3

Reads the rollout's parts; writes scores-*.parquet in completion_id order, one column for each reward function beside
their sum, and the columns of stages/tasks/checks.py, which say more of a program and are part of no reward. All
completions of a group meet the same hidden seeds. Programs that the rollout handed over are being judged already; the
rest follow no faster than the pool takes them. Every verdict is journalled at once and never made again. A sandbox
that fails is an exception, so it is never taken for a program that failed.
"""

import time

from stages.artifacts import StageContext, StageId
from stages.artifacts.command import main as command_main
from stages.artifacts.parquet import ROLLOUTS, read_table, write_parts
from stages.sandbox import SandboxPool
from stages.tasks import judging, registry, tables
from stages.tasks.base import Score
from stages.tasks.early import early_judging
from stages.tasks.judging import Attempt


def run(context: StageContext) -> None:
    """Judges the completions of iteration `context.stage.index`."""
    config, iteration = context.config, context.stage.index
    assert iteration is not None
    task = registry.of(config)
    columns = ["completion_id", "group_index", "completion"]
    folder = context.input(StageId("rollout", iteration))
    rollouts = read_table(folder, "rollouts", ROLLOUTS, columns=columns).to_pylist()
    attempts = [judging.training_attempt(context, task, **row) for row in rollouts]

    journal = context.journal("verdicts")
    scores = {record["completion_id"]: judging.from_record(record) for record in journal.records()}

    def keep(attempt: Attempt, score: Score) -> None:
        journal.append({"completion_id": attempt.attempt_id, **judging.to_record(score)})
        scores[attempt.attempt_id] = score
        report()

    def report() -> None:
        mean = sum(score.reward for score in scores.values()) / max(len(scores), 1)
        figures: dict[str, float | str] = {"mean reward": round(mean, 3)}
        if pool is not None and pool.num_waiting:
            figures["waiting"] = pool.num_waiting
        context.progress(len(scores), len(attempts), "completions", **figures)

    pool: SandboxPool | None = None
    report()
    started = time.perf_counter()
    missing = [attempt for attempt in attempts if attempt.attempt_id not in scores]
    early = early_judging(context)
    if missing:
        pool = judging.sandbox_of(context, task)
        limits = judging.limits_of(config.sandbox)
        judging.judge(missing, task=task, pool=pool, limits=limits, on_score=keep, begun=early.take)
    early.close()
    context.timings.append({"what": "judge", "seconds": time.perf_counter() - started})

    rows = [
        {
            "completion_id": attempt.attempt_id,
            "outcome": str(scores[attempt.attempt_id].outcome),
            "reward": scores[attempt.attempt_id].reward,
            **{f"reward_{name}": scores[attempt.attempt_id].rewards[name] for name in task.reward_names},
            "program": attempt.program,
            task.cases: scores[attempt.attempt_id].cases,
            "detail": scores[attempt.attempt_id].detail,
            **scores[attempt.attempt_id].checks,
        }
        for attempt in sorted(attempts)
    ]
    write_parts(context.out, "scores", rows, tables.scores(task))


def main() -> None:
    command_main("score", run)


if __name__ == "__main__":
    main()
