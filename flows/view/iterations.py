"""A run's iterations and evaluations, the groups of an iteration, the completions of a group."""

import time
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Sparkline, Static, TabbedContent, TabPane
from textual.worker import get_current_worker

from flows.view.completion import CompletionPage
from flows.view.evaluations import HeldOutPage
from flows.view.page import OfRun, Rows
from stages.artifacts import history
from stages.artifacts.history import Iteration
from stages.artifacts.run import RunDir
from stages.runs import listing, show, tables
from stages.runs.tables import printable
from stages.tasks import registry

SHOWN_EVERY_S = 1.0  # a long run is shown in part that often while it is read


class RunPage(OfRun):
    """The reward over the iterations, a line for each of them, and one for each player of the evaluations."""

    DEFAULT_CSS = """
    RunPage Sparkline { height: 2; margin: 0 1; }
    RunPage Sparkline > .sparkline--max-color { color: $primary; }
    RunPage Sparkline > .sparkline--min-color { color: $primary 45%; }
    RunPage TabbedContent, RunPage ContentSwitcher, RunPage TabPane { height: 1fr; padding: 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("1", "tab('iterations')", "Iterations"),
        Binding("2", "tab('evaluations')", "Held out"),
    ]
    KEYS: ClassVar = (("1 2", "iterations, evaluations"),)

    def __init__(self, rundir: RunDir) -> None:
        super().__init__(rundir)

    def body(self) -> ComposeResult:
        yield Static(id="facts", classes="note", markup=False)
        yield Sparkline([], summary_function=lambda values: sum(values) / len(values))
        with TabbedContent():
            with TabPane("Iterations", id="iterations"):
                yield Rows(id="of-iterations")
            with TabPane("Held out", id="evaluations"):
                yield Rows(id="of-evaluations")

    def read(self) -> tuple[list[Iteration], dict[int, list[dict[str, Any]]], str]:
        """A long run is shown in part while the rest of it is read."""
        config = self.rundir.config()
        evaluations = history.evaluated(self.rundir)
        scored = history.scored(self.rundir)
        iterations: list[Iteration] = []
        shown = time.monotonic()
        for index in scored:
            iterations.append(history.summed_up(self.rundir, index))
            if time.monotonic() - shown > SHOWN_EVERY_S and not get_current_worker().is_cancelled:
                told = f"{len(iterations)} of {len(scored)} iterations read"
                self.app.call_from_thread(self.refill, ([*iterations], evaluations, told))
                shown = time.monotonic()
        done = f"{len(iterations)} of {config.train.iterations} iterations scored, {listing.state(self.rundir)}"
        model = "/".join(Path(config.model.source).parts[-2:])
        facts = f"{config.task.name}, preset {config.preset}, {model}: {done}"
        return iterations, evaluations, facts

    def fill(self, found: tuple[list[Iteration], dict[int, list[dict[str, Any]]], str]) -> None:
        iterations, evaluations, facts = found
        rewards = [each.reward for each in iterations]
        facts += f"\nreward {rewards[0]:.2f} -> {rewards[-1]:.2f}" if rewards else "\nno rewards yet"
        self.query_one("#facts", Static).update(printable(facts))
        chart = self.query_one(Sparkline)
        chart.data, chart.display = rewards, len(rewards) > 1
        self.fill_iterations(iterations)
        self.fill_evaluations(evaluations)
        self.query_one(f"#of-{self.query_one(TabbedContent).active}", Rows).focus()

    def fill_iterations(self, iterations: list[Iteration]) -> None:
        table = self.query_one("#of-iterations", Rows)
        table.clear(columns=True)
        table.add_columns("#", "reward", "spread", "ok", "no signal", "tokens", "kl", "other outcomes")
        for row in iterations:
            kl = row.metrics.get("kl")
            reward = Text.assemble((f"{row.reward:.2f}", "bold"), (f" \u00b1{row.reward_error:.2f}", "dim"))
            others = {name: count for name, count in row.outcomes.items() if name != "ok"}
            table.add_row(
                right(row.index),
                reward,
                right(f"{row.spread:.2f}"),
                right(f"{100 * row.outcomes.get('ok', 0) / row.completions:.0f} %"),
                right(f"{row.silent_groups}/{row.groups}"),
                right(f"{row.tokens:.0f}"),
                right("" if kl is None else f"{kl:.3f}"),
                tables.told(others, most=2),
                key=str(row.index),
            )

    def fill_evaluations(self, evaluations: dict[int, list[dict[str, Any]]]) -> None:
        task = registry.of(self.rundir.config())
        table = self.query_one("#of-evaluations", Rows)
        table.clear(columns=True)
        first, *others = task.figures
        table.add_columns(
            task.player, first.title, "95 %", *(each.short or each.title for each in others), "distinct", task.cases
        )
        last = max(evaluations, default=0)
        for updates, rows in evaluations.items():
            for row in rows:
                if row["kind"] != "policy" and updates != last:
                    continue  # a baseline is the same each time
                low, high = (tables.shown(first, row[first.name + end]) for end in ("_low", "_high"))
                table.add_row(
                    printable(tables.player(row, updates)),
                    right(tables.shown(first, row[first.name]), style="bold"),
                    f"{low} to {high}",
                    *(right(tables.shown(each, row[each.name])) for each in others),
                    right(f"{row['distinct_programs']} of {row['programs']}"),
                    right(row[task.cases]),
                    key=f"{updates}:{row['kind']}:{row['name']}",
                )

    def action_tab(self, name: str) -> None:
        self.query_one(TabbedContent).active = name
        self.query_one(f"#of-{name}", Rows).focus()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        key = str(event.row_key.value)
        if event.data_table.id == "of-iterations":
            self.app.push_screen(IterationPage(self.rundir, int(key)))
        else:
            updates, kind, name = key.split(":", 2)
            self.app.push_screen(HeldOutPage(self.rundir, int(updates), kind, name))


class IterationPage(OfRun):
    """The groups of an iteration, each with where its rewards lie between the lowest and the highest of all."""

    def __init__(self, rundir: RunDir, iteration: int) -> None:
        super().__init__(rundir, f"> iteration {iteration}")
        self.iteration = iteration

    def body(self) -> ComposeResult:
        yield Static(id="facts", classes="note", markup=False)
        yield Rows()

    def read(self) -> list[dict[str, Any]]:
        return show.groups(self.rundir, self.iteration)

    def fill(self, found: list[dict[str, Any]]) -> None:
        low = min((row["worst"]["reward"] for row in found), default=0.0)
        high = max((row["best"]["reward"] for row in found), default=0.0)
        self.query_one("#facts", Static).update(
            f"{len(found)} groups; a strip shows where a group's rewards lie, from {low:.2f} to {high:.2f}"
        )
        table = self.query_one(Rows)
        table.clear(columns=True)
        table.add_columns("group", "mean", "spread", "rewards", "worst", "best", "outcomes")
        for row in found:
            table.add_row(
                right(row["group"]),
                right(f"{row['mean']:.2f}", style="bold"),
                right(f"{row['spread']:.2f}"),
                tables.strip(row["rewards"], low, high, width=16),
                right(f"{row['worst']['reward']:.2f}"),
                right(f"{row['best']['reward']:.2f}"),
                Text.assemble(("no signal: " if row["silent"] else "", "dim"), tables.told(row["outcomes"], most=1)),
                key=str(row["group"]),
            )

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        self.app.push_screen(GroupPage(self.rundir, self.iteration, int(str(event.row_key.value))))


class GroupPage(OfRun):
    """The completions of a group."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("s", "sort", "Sort")]
    KEYS: ClassVar = (("s", "sort by reward, or by number"),)

    def __init__(self, rundir: RunDir, iteration: int, group: int) -> None:
        super().__init__(rundir, f"> iteration {iteration} > group {group}")
        self.iteration, self.group = iteration, group
        self.by_reward = False
        self.found: list[dict[str, Any]] = []

    def body(self) -> ComposeResult:
        yield Static(id="facts", classes="note", markup=False)
        yield Rows()

    def read(self) -> list[dict[str, Any]]:
        return show.members(self.rundir, self.iteration, self.group)

    def fill(self, found: list[dict[str, Any]]) -> None:
        self.found = found
        parts = list(history.rewards(found[0])) if found else []
        self.query_one("#facts", Static).update(
            f"{len(found)} completions, sorted by {'reward' if self.by_reward else 'number'}"
        )
        table = self.query_one(Rows)
        table.clear(columns=True)
        table.add_columns("#", "reward", *(name.replace("_", " ") for name in parts), "outcome", "tokens", "adv.")
        for row in sorted(found, key=lambda row: -row["reward"]) if self.by_reward else found:
            advantage = row.get("advantage")
            ended = "" if row["finish_reason"] == "stop" else f" {row['finish_reason']}"
            table.add_row(
                right(row["sample_index"]),
                right(f"{row['reward']:.2f}", style="bold"),
                *(right(f"{value:.2f}") for value in history.rewards(row).values()),
                Text(row["outcome"].replace("_", " "), style="green" if row["outcome"] == "ok" else "red"),
                right(f"{row['num_tokens']}{ended}"),
                right("" if advantage is None else f"{advantage:+.2f}"),
                key=row["completion_id"],
            )

    def action_sort(self) -> None:
        self.by_reward = not self.by_reward
        self.fill(self.found)

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        chosen = str(event.row_key.value)
        ids = [str(row.key.value) for row in event.data_table.ordered_rows]
        self.app.push_screen(CompletionPage(self.rundir, ids, chosen))


def right(value: object, *, style: str = "") -> Text:
    """A cell whose text ends at its right edge."""
    return Text(str(value), style=style, justify="right")
