"""`flexsink inspect RUN --diff M N`: what changed between two iterations, in figures and in their best programs."""

import difflib
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from stages.artifacts import history
from stages.artifacts.history import Iteration
from stages.artifacts.run import RunDir
from stages.runs.tables import coloured, console, printable

CLEAR = 2.0  # standard errors from which a change of the mean reward is called one
LONGEST = 80  # lines of the programs' difference that a terminal is shown; --json has all


def compared(run: RunDir, first: int, second: int) -> dict[str, Any]:
    """Both iterations in figures, each with its change; their programs; the difference of their best ones.

    reward.standard_errors is the change over its standard error, groups as units; None where there is none.
    """
    before, after = (history.summed_up(run, index) for index in (first, second))
    error = (before.reward_error**2 + after.reward_error**2) ** 0.5
    outcomes = sorted({*before.outcomes, *after.outcomes}, key=lambda name: (name != "ok", name))
    one, two = (figures(row, outcomes) for row in (before, after))
    return {
        "run": str(run.path),
        "iterations": [first, second],
        "reward": {
            "from": before.reward,
            "to": after.reward,
            "change": after.reward - before.reward,
            "standard_errors": (after.reward - before.reward) / error if error else None,
        },
        "figures": [
            {"name": name, "from": one.get(name), "to": two.get(name), "change": _change(one.get(name), two.get(name))}
            for name in dict.fromkeys((*one, *two))
        ],
        **programs(run, first, second),
    }


def figures(row: Iteration, outcomes: Sequence[str]) -> dict[str, float]:
    """An iteration's figures by name, with the share of each of `outcomes`.

    Shares are of its completions, those of the checks of the programs that ended ok and of which it is known.
    """
    found = {"reward": row.reward}
    found |= {f"reward: {name.replace('_', ' ')}": value for name, value in row.parts.items()}
    found |= {"spread inside a group": row.spread, "groups with no signal": row.silent_groups / max(row.groups, 1)}
    found |= {f"share: {name.replace('_', ' ')}": row.outcomes.get(name, 0) / row.completions for name in outcomes}
    for name, counts in row.checks.items():
        known = counts["yes"] + counts["no"]
        if known:
            found[f"{name.replace('_', ' ')}: yes"] = counts["yes"] / known
    found |= {"tokens": row.tokens, "share cut off": row.truncated}
    return found | {name.replace("_", " "): value for name, value in row.metrics.items()}


def programs(run: RunDir, first: int, second: int) -> dict[str, Any]:
    """How many different programs each iteration has and shares with the other, and how their best ones differ."""
    rows = [history.completions(run, index, ["program", "reward"]).to_pylist() for index in (first, second)]
    texts = [{row["program"] for row in each if row["program"]} for each in rows]
    best = [max((row for row in each if row["program"]), key=lambda row: row["reward"], default=None) for each in rows]
    lines = [(row["program"] if row else "").splitlines() for row in best]
    names = [f"{row['completion_id']} (reward {row['reward']:.2f})" if row else "no program" for row in best]
    return {
        "programs": {"from": len(texts[0]), "to": len(texts[1]), "common": len(texts[0] & texts[1])},
        "best": {
            "from": best[0]["completion_id"] if best[0] else None,
            "to": best[1]["completion_id"] if best[1] else None,
            "diff": "\n".join(difflib.unified_diff(lines[0], lines[1], names[0], names[1], lineterm="", n=2)),
        },
    }


def print_compared(found: dict[str, Any]) -> None:
    """The change in words, a line for each figure, the difference of the best programs."""
    first, second = found["iterations"]
    reward, texts = found["reward"], found["programs"]
    out = console()
    errors = reward["standard_errors"]
    told = "one group each: no standard error" if errors is None else f"{errors:+.1f} standard errors"
    clear = errors is not None and abs(errors) >= CLEAR
    word = "no clear change" if not clear else "better" if reward["change"] > 0 else "worse"
    out.print(
        Text.assemble(
            (f"iteration {first} -> {second}: {word}", "bold"),
            f", reward {reward['from']:.2f} -> {reward['to']:.2f} ({told})",
        )
    )
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("")
    for name in (str(first), str(second), "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found["figures"]:
        cells = ("" if row[name] is None else f"{row[name]:.4g}" for name in ("from", "to"))
        change = row["change"]
        table.add_row(printable(row["name"]), *cells, "" if not change else f"{change:+.3g}")
    out.print(table)
    out.print(
        f"different programs: {texts['from']} -> {texts['to']}, {texts['common']} in both; the best ones differ by:"
    )
    lines = printable(found["best"]["diff"]).split("\n")
    shown = "\n".join(lines[:LONGEST]) or "nothing"
    out.print(coloured(shown, "diff"))
    if len(lines) > LONGEST:
        out.print(Text(f"... {len(lines) - LONGEST} more lines", style="dim"))


def _change(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
