"""A finished run in a few figures, read from its Parquet: for the terminal and for Prefect's UI."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.artifacts import RunDir, StageId
from stages.artifacts.manifest import NAME
from stages.config import UserError

if TYPE_CHECKING:
    from stages.tasks.base import Task


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
    task: "Task"
    # whose figures the evaluations hold
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
        from stages.tasks import registry

        evaluations = finished(run, "evaluations/*")
        last = evaluations[-1] if evaluations else 0
        return cls(
            registry.of(run.config()),
            reward_rows(run),
            policy_row(run, 0),
            policy_row(run, last) if last else None,
            last,
        )

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
                lines.append(f"{name:<12}{figures(row, self.task)}")
        return lines

    def markdown(self) -> str:
        """For Prefect's UI."""
        lines = ["| iteration | mean reward |", "|---|---|"]
        lines += [f"| {row['iteration']} | {row['reward']:.3f} |" for row in self.rewards]
        for name, row in (("untrained", self.before), (f"after {self.updates} updates", self.after)):
            if row:
                lines += ["", f"Evaluation {name}: {figures(row, self.task)}"]
        return "\n".join(lines) + "\n"


def finish(run: RunDir, note: Callable[[str], None]) -> None:
    """Writes the report of a finished run and tells what the run came to."""
    import stages.report

    for line in Summary.of(run).lines():
        note(line)
    try:
        note(f"report      {stages.report.write_report(run.path)}")
    except UserError as error:
        note(f"report      not written: {error.message}")  # the run itself is whole


def policy_row(run: RunDir, updates: int) -> dict[str, Any] | None:
    from stages.artifacts.parquet import part_paths, read_table

    folder = run.folder(StageId("evaluate", updates))
    if not part_paths(folder, "summary"):
        return None
    rows: list[dict[str, Any]] = read_table(folder, "summary").to_pylist()
    return next((row for row in rows if row.get("kind") == "policy"), None)


def figures(row: dict[str, Any], task: "Task") -> str:
    """The task's figures in one line: "mean score 3010 [2644, 3391], wins 1.2 %, 60 distinct of 64 programs"."""
    parts = []
    for figure in task.figures:
        if row.get(figure.name) is not None:
            value: float = row[figure.name]
            low, high = row.get(f"{figure.name}_low"), row.get(f"{figure.name}_high")
            text = f"{100 * value:.1f} %" if figure.share else f"{value:.{figure.digits}f}"
            if low is not None and not figure.share:
                text += f" [{low:.{figure.digits}f}, {high:.{figure.digits}f}]"
            parts.append(f"{figure.counted or figure.title} {text}")
    return ", ".join([*parts, f"{row['distinct_programs']} distinct of {row['programs']} programs"])
