"""The runs of a folder."""

from pathlib import Path
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.widgets import DataTable

from flows.view.iterations import RunPage
from flows.view.page import Page, Rows
from stages.artifacts.run import RunDir
from stages.runs import listing
from stages.runs.tables import printable


class RunsPage(Page):
    """One line a run, the newest last; Enter opens it."""

    KEYS: ClassVar = ()

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.heading = f"Runs in {folder}"

    def body(self) -> ComposeResult:
        yield Rows()

    def read(self) -> list[dict[str, Any]]:
        return listing.rows(self.folder)

    def fill(self, found: list[dict[str, Any]]) -> None:
        table = self.query_one(Rows)
        table.clear(columns=True)
        table.add_columns("run", "created", "state", "iterations", "reward", "size")
        for row in found:
            table.add_row(*(printable(each) for each in listing.cells(row, short=True)), key=row["run"])
        if not found:
            self.head(f"{self.heading}: none yet. Start one with: flexsink train tiny")

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        path = Path(str(event.row_key.value))
        if (path / "config.json").is_file():
            self.app.push_screen(RunPage(RunDir(path)))
        else:
            self.notify(f"{path} holds no run that can be read", severity="warning")
