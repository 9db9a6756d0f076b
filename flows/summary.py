"""A finished run in a few figures, read from its Parquet: for the terminal and for Prefect's UI."""

import re
from typing import Any, NamedTuple

from stages.artifacts import RunDir, StageId
from stages.artifacts.manifest import NAME


def finished(run: RunDir, pattern: str) -> list[int]:
    """Numbers of the published stage folders that match, in order: finished(run, "iterations/*/score")."""
    found = (re.search(r"\d+", str(path.relative_to(run.path))) for path in run.path.glob(f"{pattern}/{NAME}"))
    return sorted(int(match.group()) for match in found if match)


def reward_rows(run: RunDir) -> list[dict[str, Any]]:
    """One row per scored iteration: its number, mean reward, and how many completions of each outcome."""
    from stages.artifacts.parquet import read_table

    rows = []
    for iteration in finished(run, "iterations/*/score"):
        table = read_table(run.folder(StageId("score", iteration)), "scores", columns=["reward", "outcome"])
        rewards, outcomes = table.column("reward").to_pylist(), table.column("outcome").to_pylist()
        counts = {name: outcomes.count(name) for name in sorted(set(outcomes))}
        mean = sum(rewards) / len(rewards) if rewards else 0.0
        rows.append({"iteration": iteration, "reward": round(mean, 4), "completions": len(rewards), **counts})
    return rows


class Summary(NamedTuple):
    rewards: list[dict[str, Any]]
    # of `reward_rows`
    before: dict[str, Any] | None
    # the evaluation's row of the untrained policy
    after: dict[str, Any] | None
    # that of the last policy evaluated
    updates: int
    # how many updates that one has had

    @classmethod
    def of(cls, run: RunDir) -> "Summary":
        evaluations = finished(run, "evaluations/*")
        last = evaluations[-1] if evaluations else 0
        return cls(reward_rows(run), policy_row(run, 0), policy_row(run, last) if last else None, last)

    def lines(self) -> list[str]:
        """For a terminal."""
        lines = []
        if self.rewards:
            first, last = self.rewards[0], self.rewards[-1]
            lines.append(
                f"reward      {first['reward']:.3f} (iteration {first['iteration']}) -> "
                f"{last['reward']:.3f} (iteration {last['iteration']})"
            )
        for name, row in (("untrained", self.before), (f"{self.updates} updates", self.after)):
            if row:
                lines.append(f"{name:<12}{figures(row)}")
        return lines

    def markdown(self) -> str:
        """For Prefect's UI."""
        lines = ["| iteration | mean reward |", "|---|---|"]
        lines += [f"| {row['iteration']} | {row['reward']:.3f} |" for row in self.rewards]
        for name, row in (("untrained", self.before), (f"after {self.updates} updates", self.after)):
            if row:
                lines += ["", f"Evaluation {name}: {figures(row)}"]
        return "\n".join(lines) + "\n"


def policy_row(run: RunDir, updates: int) -> dict[str, Any] | None:
    from stages.artifacts.parquet import part_paths, read_table

    folder = run.folder(StageId("evaluate", updates))
    if not part_paths(folder, "summary"):
        return None
    rows: list[dict[str, Any]] = read_table(folder, "summary").to_pylist()
    return next((row for row in rows if row.get("kind") == "policy"), None)


def figures(row: dict[str, Any]) -> str:
    text = f"mean score {row['mean_score']:.0f}"
    if row.get("mean_score_low") is not None:
        text += f" [{row['mean_score_low']:.0f}, {row['mean_score_high']:.0f}]"
    if row.get("win_rate") is not None:
        text += f", wins {100 * row['win_rate']:.1f} %"
    return text + f", {row['distinct_programs']} distinct of {row['programs']} programs"
