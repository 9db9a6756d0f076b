"""evaluate: samples programs from the policy and judges each on held-out seeds, with baselines beside it.

    python -m stages.evaluate --run-dir R --updates 24

Writes evaluations-*.parquet (a row for each program and each baseline, with its figures and cases) and summary.parquet
(a row for the policy and each baseline). Figures and cases are the task's: mean score, wins and games for 2048. The
n-th program meets the same held-out seeds, and is sampled with the same seed, in every evaluation of a run, so that
what differs between two of them is the policy. Completions and verdicts are journalled: a killed evaluation goes on
with what is missing.

A program that cheated is measured as one without cases. Intervals are 95 % percentile bootstraps: over programs for
the policy, over cases for a baseline, which is a single program.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stages.artifacts import StageContext, derive
from stages.artifacts.command import main as command_main
from stages.artifacts.parquet import write_parts, write_table
from stages.engine import Completion, Request, live_engine, sampling_of
from stages.model.policy import live_policy
from stages.sandbox import Outcome
from stages.tasks import judging, registry, tables
from stages.tasks.base import Score, Task
from stages.tasks.judging import Attempt
from stages.tasks.programs import syntax_tree

RESAMPLES = 2000


def run(context: StageContext) -> None:
    """Evaluates the policy that has had `context.stage.index` updates."""
    config, updates = context.config, context.stage.index
    assert updates is not None
    task = registry.of(config)
    completions = sample(context, task, updates)
    programs = [(completion_id, task.extract(text)) for completion_id, text in sorted(completions.items())]
    attempts = judging.held_out(programs, task=task, games=config.evaluate.games)
    scores = judge(context, task, [*attempts, *baseline_attempts(context, task)])

    rows = [
        {"kind": "policy", "name": f"policy {updates}", "completion_id": name, "completion": completions[name]}
        | measured(program, [scores[name]], task)
        for name, program in programs
    ]
    for name, program in task.baselines().items():
        played = [score for attempt, score in scores.items() if attempt.startswith(f"baseline-{name}-")]
        rows.append({"kind": "baseline", "name": name} | measured(program, played, task))
    write_parts(context.out, "evaluations", rows, tables.evaluations(task))
    write_table(context.out / "summary.parquet", summarise(rows, task), tables.summary(task))


def sample(context: StageContext, task: Task, updates: int) -> dict[str, str]:
    """Returns the text of every completion by id, sampling those that the journal lacks."""
    config = context.config
    journal = context.journal("completions")
    texts = {record["completion_id"]: record["completion"] for record in journal.records()}
    total = config.evaluate.programs
    context.progress(len(texts), total, "completions")
    if len(texts) == total:
        return texts
    policy = live_policy(context, updates)
    (prompt,) = task.prompts(1, 0, config.train.seed)
    prompt_ids = policy.render(prompt.messages)
    requests = []
    for number in range(total):
        sampling = sampling_of(config, policy, seed=derive("evaluate", config.train.seed, number))
        name = f"e{updates:05d}-{number:04d}"
        if name not in texts:
            requests.append(Request(completion_id=name, prompt_ids=prompt_ids, sampling=sampling))
    num_tokens, started = 0, time.perf_counter()

    def keep(completion: Completion) -> None:
        nonlocal num_tokens
        num_tokens += len(completion.completion_ids)
        text = policy.decode(completion.completion_ids)
        journal.append({"completion_id": completion.completion_id, "completion": text})
        texts[completion.completion_id] = text
        context.progress(len(texts), total, "completions")

    engine = live_engine(context, policy)
    engine.run(requests, on_finished=keep)
    seconds = time.perf_counter() - started
    context.timings.append({"what": "sample", "seconds": seconds, "tokens_per_s": num_tokens / max(seconds, 1e-9)})
    return texts


def baseline_attempts(context: StageContext, task: Task) -> list[Attempt]:
    """Returns the baselines' attempts, in jobs of as many cases as a program's."""
    games = context.config.evaluate.games
    jobs = -(-min(task.baseline_cases, games * context.config.evaluate.programs) // games)
    return [
        attempt
        for name, program in task.baselines().items()
        for attempt in judging.held_out(
            [(f"baseline-{name}-{job:04d}", program) for job in range(jobs)], task=task, games=games
        )
    ]


def judge(context: StageContext, task: Task, attempts: Sequence[Attempt]) -> dict[str, Score]:
    """Returns the score of every attempt by id, judging those that the journal lacks."""
    journal = context.journal("verdicts")
    scores = {record["attempt_id"]: judging.from_record(record) for record in journal.records()}
    missing = [attempt for attempt in attempts if attempt.attempt_id not in scores]

    def keep(attempt: Attempt, score: Score) -> None:
        journal.append({"attempt_id": attempt.attempt_id, **judging.to_record(score)})
        scores[attempt.attempt_id] = score
        context.progress(len(scores), len(attempts), "programs")

    started = time.perf_counter()
    if missing:
        pool = judging.sandbox_of(context, task)
        limits = judging.limits_of(context.config.sandbox)
        judging.judge(missing, task=task, pool=pool, limits=limits, on_score=keep)
    context.timings.append({"what": "judge", "seconds": time.perf_counter() - started})
    return {attempt.attempt_id: scores[attempt.attempt_id] for attempt in attempts}


def measured(program: str | None, scores: Sequence[Score], task: Task) -> dict[str, Any]:
    """Returns a row's columns for a program judged in one or more jobs; the outcome is the first that is not ok."""
    outcome = next((score.outcome for score in scores if score.outcome != Outcome.ok), Outcome.ok)
    return {
        "program": program,
        "outcome": str(outcome),
        "syntax_tree": None if program is None else syntax_tree(program),
        **judging.figures(scores, task=task),
        task.cases: [case for score in scores for case in score.cases],
    }


class Interval(NamedTuple):
    """Example: Interval(mean=3010.5, low=2644.0, high=3391.2)"""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float], *, seed: int) -> Interval:
    """Returns the mean of the values and its 95 % percentile bootstrap interval (Efron 1979)."""
    sample = np.asarray(values or [0.0], dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(sample), size=(RESAMPLES, len(sample)))
    low, high = np.percentile(sample[drawn].mean(axis=1), [2.5, 97.5])
    return Interval(float(sample.mean()), float(low), float(high))


def summarise(rows: Sequence[dict[str, Any]], task: Task) -> list[dict[str, Any]]:
    """Returns a summary row for each name, in the order in which they come."""
    names = list(dict.fromkeys((row["kind"], row["name"]) for row in rows))
    summaries = []
    for kind, name in names:
        own = [row for row in rows if (row["kind"], row["name"]) == (kind, name)]
        cases = [case for row in own for case in row[task.cases]]
        units = [task.measure([case]) for case in cases] if kind == "baseline" else own
        summary = {
            "kind": kind,
            "name": name,
            "programs": len(own),
            "distinct_programs": len({row["syntax_tree"] for row in own if row["syntax_tree"]}),
            task.cases: len(cases),
        }
        for figure in task.figures:
            seed = derive("bootstrap", figure.stream or figure.name, name)
            interval = bootstrap([unit[figure.name] for unit in units], seed=seed)
            summary |= {
                figure.name: interval.mean,
                f"{figure.name}_low": interval.low,
                f"{figure.name}_high": interval.high,
            }
        if task.tally:
            counts = Counter(case[task.tally.of] for case in cases)
            summary[task.tally.name] = [
                {task.tally.value: value, task.cases: count} for value, count in sorted(counts.items())
            ]
        summaries.append(summary)
    return summaries


def main() -> None:
    command_main("evaluate", run)


if __name__ == "__main__":
    main()
