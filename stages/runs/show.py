"""What `inspect` was asked for: picked out of the run as plain records, then printed as JSON or as tables."""

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from stages.artifacts import history
from stages.artifacts.history import Iteration
from stages.artifacts.manifest import NAME
from stages.artifacts.parquet import EVALUATIONS, SAMPLES, read_table
from stages.artifacts.run import RunDir
from stages.artifacts.stage import StageId
from stages.config import UserError, pasteable, unknown
from stages.tasks import registry
from stages.tasks.base import Task

OUTCOMES = ("ok", "no_program", "syntax_error", "foreign_import", "cheat", "timeout", "memory", "crash", "output_limit")
FIGURES = ["prompt_id", "group_index", "reward", "outcome"]
DEFAULT_TOP = 3


def show(args: Namespace) -> int:
    """Print what was asked for and return the exit code."""
    from stages.runs import tables

    run = RunDir.open(args.run)
    if args.outcome is not None and args.outcome not in OUTCOMES:
        raise unknown(f"outcome {args.outcome!r}", args.outcome, OUTCOMES, prefix="--outcome ")
    if args.completion is not None:
        return show_completion(run, args)
    if args.tokens:
        raise UserError("--tokens is of one completion", "name it: --completion 00003-002-005 --tokens")
    if args.diff is not None:
        from stages.runs.compare import compared, print_compared

        found = compared(run, *args.diff)
        print(as_json({"diff": found})) if args.json else print_compared(found)
        return 0
    answer = overview(run) if _asks_for_all(args) else {}
    if args.iteration is not None:
        answer |= {"iteration": asdict(history.summed_up(run, args.iteration)), "groups": groups(run, args.iteration)}
    if not _asks_for_all(args):
        answer["completions"] = list(chosen(run, args))
    if args.json:
        print(as_json(answer))
    else:
        tables.print_answer(run, answer)
    return 0


def show_completion(run: RunDir, args: Namespace) -> int:
    """Print one completion whole, or its tokens."""
    from stages.runs import tables

    found = completion(run, args.completion)
    if args.tokens:
        from stages.runs import tokens

        spoken = tokens.of(run, args.completion)
        found["tokens"] = [token._asdict() for token in spoken.tokens]
    if args.json:
        print(as_json(found))
    elif args.tokens:
        tables.print_tokens(found["tokens"])
    else:
        tables.print_completion(found, task=registry.of(run.config()), whole=True)
    return 0


def overview(run: RunDir) -> dict[str, Any]:
    """The run at a glance: every scored iteration and every evaluation in figures."""
    iterations: list[Iteration] = [history.summed_up(run, i) for i in history.scored(run)]
    evaluations = [{"updates": updates, **row} for updates, rows in history.evaluated(run).items() for row in rows]
    return {
        "run": str(run.path),
        "iterations": [asdict(iteration) for iteration in iterations],
        "evaluations": evaluations,
    }


def groups(run: RunDir, iteration: int) -> list[dict[str, Any]]:
    """The groups of one iteration: rewards, their mean and spread, the best and the worst completion."""
    rows = history.completions(run, iteration, FIGURES).to_pylist()
    kept: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        kept.setdefault(row["group_index"], []).append(row)
    return [_group(index, members) for index, members in sorted(kept.items())]


def ids(run: RunDir, iteration: int) -> list[str]:
    """The completions of a scored iteration."""
    names: list[str] = history.completions(run, iteration, []).column("completion_id").to_pylist()
    return names


def members(run: RunDir, iteration: int, group: int) -> list[dict[str, Any]]:
    """The completions of one group, without their texts: rewards, outcome, tokens, and the advantage if any."""
    task = registry.of(run.config())
    names = [*FIGURES, "sample_index", "num_tokens", "finish_reason", *reward_columns(task)]
    rows: list[dict[str, Any]] = history.completions(run, iteration, names).to_pylist()
    known = {row["group_index"] for row in rows}
    if group not in known:
        raise UserError(f"there is no group {group}", f"groups are 0 to {max(known, default=0)}")
    advantages = advantages_of(run, iteration)
    return [{**row, "advantage": advantages.get(row["completion_id"])} for row in rows if row["group_index"] == group]


def reward_columns(task: Task) -> list[str]:
    return [name if name.startswith("reward_") else f"reward_{name}" for name in task.reward_names]


def chosen(run: RunDir, args: Namespace) -> Iterator[dict[str, Any]]:
    """The completions that pass the filters, best first (worst first on request), whole."""
    iterations = history.scored(run) if args.iteration is None else [args.iteration]
    checks = [_check(text) for text in args.check]
    columns = [*FIGURES, *(name for name, _ in checks), *(["program"] if args.contains is not None else [])]
    rows = [row for i in iterations for row in history.completions(run, i, columns).to_pylist()]
    if args.group is not None:
        known = {row["group_index"] for row in rows}
        if args.group not in known:
            raise UserError(f"there is no group {args.group}", f"groups are 0 to {max(known, default=0)}")
        rows = [row for row in rows if row["group_index"] == args.group]
    if args.outcome is not None:
        rows = [row for row in rows if row["outcome"] == args.outcome]
    if args.min_reward is not None:
        rows = [row for row in rows if row["reward"] >= args.min_reward]
    if args.max_reward is not None:
        rows = [row for row in rows if row["reward"] <= args.max_reward]
    if args.contains is not None:
        rows = [row for row in rows if args.contains in (row["program"] or "")]
    for name, wanted in checks:
        rows = [row for row in rows if _answered(row[name]) == wanted]
    sign = 1 if args.worst else -1
    rows.sort(key=lambda row: (sign * row["reward"], row["completion_id"]))
    names = [row["completion_id"] for row in rows[: DEFAULT_TOP if args.top is None else args.top]]
    texts = history.texts(run, names)
    cases = registry.of(run.config()).cases
    return (_told(texts[name], cases) for name in names)


def completion(run: RunDir, completion_id: str) -> dict[str, Any]:
    """One completion whole, of training (00003-002-005) or of an evaluation (e00024-0042)."""
    number = completion_id.lstrip("e").split("-")[0]
    if not number.isdecimal():
        raise UserError(f"{completion_id!r} is no completion", "ids look like 00003-002-005, or e00024-0042")
    if completion_id.startswith("e"):
        return _evaluated(run, completion_id, int(number))
    index = int(number)
    history.completions(run, index, [])  # says so when the iteration has no scores
    rows = history.texts(run, [completion_id])
    if completion_id not in rows:
        raise UserError(
            f"iteration {index} has no completion {completion_id}",
            f"see which there are with: {pasteable('flexsink', 'inspect', run.path, '--iteration', index)}",
        )
    advantage = advantages_of(run, index).get(completion_id)
    row = rows[completion_id] if advantage is None else {**rows[completion_id], "advantage": advantage}
    return _told(row, registry.of(run.config()).cases)


def as_json(answer: dict[str, Any]) -> str:
    """JSON in ASCII, so that nothing a model wrote reaches the terminal as a control character."""
    return json.dumps(answer, indent=2)


def _asks_for_all(args: Namespace) -> bool:
    filters = (args.iteration, args.group, args.top, args.outcome, args.min_reward, args.max_reward, args.contains)
    return all(value is None for value in filters) and not args.worst and not args.check


def _check(text: str) -> tuple[str, str]:
    """The check's column and the answer asked for, of depends_on_board=no."""
    name, _, answer = text.partition("=")
    if name not in history.CHECKS:
        raise unknown(f"check {name!r}", name, history.CHECKS, prefix="--check ")
    if answer not in ("yes", "no", "unknown"):
        raise UserError(f"--check {text}: {answer!r} is no answer", f"for example --check {name}=yes, no or unknown")
    return name, answer


def _answered(value: bool | str | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"


def _group(index: int, members: list[dict[str, Any]]) -> dict[str, Any]:
    rewards = [row["reward"] for row in members]
    mean = sum(rewards) / len(rewards)
    best = max(members, key=lambda row: row["reward"])
    worst = min(members, key=lambda row: row["reward"])
    outcomes: dict[str, int] = {}
    for row in members:
        outcomes[row["outcome"]] = outcomes.get(row["outcome"], 0) + 1
    return {
        "group": index,
        "prompt_id": members[0]["prompt_id"],
        "completions": len(members),
        "mean": mean,
        "spread": (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5,
        "silent": best["reward"] == worst["reward"],
        "best": {"completion_id": best["completion_id"], "reward": best["reward"]},
        "worst": {"completion_id": worst["completion_id"], "reward": worst["reward"]},
        "outcomes": outcomes,
        "rewards": sorted(rewards),
    }


def _told(row: dict[str, Any], cases: str) -> dict[str, Any]:
    """A row without its routes, and without its lists of tokens, which get a summary instead."""
    logprobs = row.get("engine_logprobs") or []
    lists = ("prompt_ids", "completion_ids", "engine_logprobs", "routes")
    told = {name: value for name, value in row.items() if name not in lists}
    told[cases] = row.get(cases) or []
    if logprobs:
        told["logprobs"] = {
            "tokens": len(logprobs),
            "mean": sum(logprobs) / len(logprobs),
            "lowest": min(logprobs),
            "lowest_at": logprobs.index(min(logprobs)),
        }
    return told


def advantages_of(run: RunDir, iteration: int) -> dict[str, float]:
    """What the update made of each completion; nothing while there is no update."""
    folder = run.folder(StageId("update", iteration))
    if not (folder / NAME).is_file():
        return {}
    rows = read_table(folder, "samples", SAMPLES, columns=["completion_id", "advantage"]).to_pylist()
    return {row["completion_id"]: row["advantage"] for row in rows}


def _evaluated(run: RunDir, completion_id: str, updates: int) -> dict[str, Any]:
    folder = run.folder(StageId("evaluate", updates))
    if not (folder / NAME).is_file():
        known = ", ".join(str(index) for index in history.evaluated(run))
        raise UserError(
            f"{run.path} has no evaluation after {updates} updates", f"it has them after: {known or 'none'}"
        )
    rows = read_table(folder, "evaluations", EVALUATIONS).to_pylist()
    row = next((row for row in rows if row["completion_id"] == completion_id), None)
    if row is None:
        last = max((row["completion_id"] or "" for row in rows), default="")
        raise UserError(f"there is no completion {completion_id}", f"the last of that evaluation is {last}")
    return _told(row, registry.of(run.config()).cases)
