"""The programs of one player of an evaluation: the policy after some updates, or a baseline."""

from typing import Any

from rich.text import Text
from textual.app import ComposeResult
from textual.widgets import DataTable, Static

from flows.view.completion import CompletionPage
from flows.view.page import OfRun, Rows
from stages.artifacts.parquet import EVALUATIONS, read_table
from stages.artifacts.run import RunDir
from stages.artifacts.stage import StageId
from stages.runs import tables
from stages.tasks import registry


class HeldOutPage(OfRun):
    """One line a program, the best first."""

    def __init__(self, rundir: RunDir, updates: int, kind: str, name: str) -> None:
        self.row_of = {"kind": kind, "name": name}
        self.updates = updates
        super().__init__(rundir, f"> held out > {tables.player(self.row_of, updates)}")
        self.found: list[dict[str, Any]] = []

    def body(self) -> ComposeResult:
        yield Static(id="facts", classes="note", markup=False)
        yield Rows()

    def read(self) -> list[dict[str, Any]]:
        rows = held_out(self.rundir, self.updates)
        rows = [row for row in rows if all(row[name] == value for name, value in self.row_of.items())]
        first = registry.of(self.rundir.config()).figures[0].name
        return sorted(rows, key=lambda row: -(row[first] or 0.0))

    def fill(self, found: list[dict[str, Any]]) -> None:
        self.found = found
        task = registry.of(self.rundir.config())
        self.query_one("#facts", Static).update(f"{len(found)} programs, the best first")
        table = self.query_one(Rows)
        table.clear(columns=True)
        table.add_columns("program", *(each.title for each in task.figures), "outcome", task.cases)
        for at, row in enumerate(found):
            table.add_row(
                row["completion_id"] or row["name"].replace("_", " "),
                *(Text(tables.shown(each, row[each.name] or 0.0), justify="right") for each in task.figures),
                Text(row["outcome"].replace("_", " "), style="green" if row["outcome"] == "ok" else "red"),
                Text(str(len(row[task.cases] or [])), justify="right"),
                key=str(at),
            )

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        row = self.found[int(str(event.row_key.value))]
        if row["completion_id"]:
            ids = [each["completion_id"] for each in self.found]
            self.app.push_screen(CompletionPage(self.rundir, ids, row["completion_id"]))
        else:
            self.app.push_screen(CompletionPage(self.rundir, [], row["name"], row=row))


def held_out(run: RunDir, updates: int) -> list[dict[str, Any]]:
    """The rows of the evaluation after so many updates."""
    rows: list[dict[str, Any]] = read_table(
        run.folder(StageId("evaluate", updates)), "evaluations", EVALUATIONS
    ).to_pylist()
    return rows


def held_out_ids(run: RunDir, completion_id: str) -> list[str]:
    """The ids of the evaluation that a completion is of."""
    updates = int(completion_id.lstrip("e").split("-")[0])
    return [row["completion_id"] for row in held_out(run, updates) if row["completion_id"]]
