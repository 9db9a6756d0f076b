"""What every screen of the browser has: a heading, a footer of keys, help, and reading that does not block the keys."""

from typing import Any, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import DataTable, Footer, Input, Static

from stages.artifacts.run import RunDir
from stages.config import UserError
from stages.runs.tables import printable


class Page(Screen[None]):
    """A screen that reads something from the disk in a thread, then shows it; `heading` says where one is.

    A subclass gives `body`, `read` (in a thread) and `fill` (with what was read). A damaged file is told in its place.
    """

    DEFAULT_CSS = """
    Page { background: $background; color: $foreground; }
    Page > #heading { dock: top; height: 1; padding: 0 1; background: $panel; color: $foreground; text-style: bold; }
    Page > #problem { padding: 1 2; color: $text-error; display: none; }
    Page * { scrollbar-size: 1 1; scrollbar-color: $primary 50%; scrollbar-background: $background; }
    Page .note { padding: 0 1; color: $text-muted; height: auto; }
    Page DataTable { height: 1fr; background: $background; }
    Page DataTable:focus { background-tint: $background 0%; }
    Page DataTable > .datatable--header { background: $background; color: $text-muted; text-style: none; }
    Page DataTable > .datatable--cursor { background: $primary 35%; color: $foreground; text-style: bold; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,backspace", "back", "Back"),
        Binding("r", "reload", "Read again", show=False),
        Binding("question_mark", "help", "Help", key_display="?"),
    ]
    KEYS: ClassVar[tuple[tuple[str, str], ...]] = ()  # of this screen alone, for its help

    heading = ""
    ready = False  # whether what was read last is shown

    def compose(self) -> ComposeResult:
        yield Static(printable(self.heading), id="heading", markup=False)
        yield from self.body()
        yield Static(id="problem", markup=False)
        yield Footer(show_command_palette=False)

    def body(self) -> ComposeResult:
        """The widgets between heading and footer."""
        raise NotImplementedError

    def read(self) -> Any:
        """What is to be shown, read from the disk."""
        raise NotImplementedError

    def fill(self, found: Any) -> None:
        """Puts what was read into the widgets."""
        raise NotImplementedError

    def on_mount(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Reads and shows what there is on the disk now."""
        self.ready = False
        self.head(f"{self.heading} ...")
        self.work()

    @work(thread=True, exclusive=True)
    def work(self) -> None:
        try:
            found = self.read()
        except UserError as error:
            self.app.call_from_thread(self.failed, error)
            return
        self.app.call_from_thread(self.filled, found)

    def filled(self, found: Any) -> None:
        if self.is_attached:  # else it was left in the meantime
            self.head(self.heading)
            self.refill(found)
            self.ready = True

    def refill(self, found: Any) -> None:
        """Shows what was read and keeps each table's row."""
        if not self.is_attached:
            return
        tables = {table: table.cursor_row for table in self.query(Rows)}
        self.fill(found)
        for table, row in tables.items():
            if table.row_count:
                table.move_cursor(row=min(row, table.row_count - 1))

    def failed(self, error: UserError) -> None:
        if self.is_attached:
            problem = self.query_one("#problem", Static)
            problem.update(f"{error.message}\n{error.hint}")
            problem.display = True
            self.head(self.heading)
            self.ready = True

    def head(self, text: str) -> None:
        """Changes the heading."""
        self.query_one("#heading", Static).update(printable(text))

    def action_back(self) -> None:
        if len(self.app.screen_stack) > 2:  # the first is the application's own, empty one
            self.app.pop_screen()

    def action_reload(self) -> None:
        self.query_one("#problem", Static).display = False
        self.begin()

    def action_help(self) -> None:
        self.app.push_screen(Help(self.KEYS))


class OfRun(Page):
    """A screen of one run, from which any of its completions can be reached by its id."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("g", "go_to", "Go to", show=False)]

    def __init__(self, rundir: RunDir, place: str = "") -> None:
        super().__init__()
        self.rundir = rundir
        self.heading = f"{rundir.path.name or rundir.path} {place}".strip()

    def action_go_to(self) -> None:
        def answered(completion_id: str | None) -> None:
            if completion_id:
                self.opened(completion_id)

        self.app.push_screen(GoTo(), answered)

    def opened(self, completion_id: str) -> None:
        """Opens a completion by its id, above the screens that Escape goes back to."""
        from flows.view.app import pages

        try:
            above = pages(self.rundir.path, completion=completion_id, tab=None)
        except UserError as error:
            self.notify(f"{error.message}\n{error.hint}", severity="warning")
            return
        while len(self.app.screen_stack) > 2:
            self.app.pop_screen()
        for page in above[1:]:
            self.app.push_screen(page)


class Rows(DataTable[Any]):
    """A table of rows that Enter opens; vi's keys move too."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select_cursor", "Open"),
        Binding("j", "cursor_down", show=False),
        Binding("k", "cursor_up", show=False),
        Binding("home", "scroll_top", show=False),
        Binding("end", "scroll_bottom", show=False),
    ]

    def __init__(self, **options: Any) -> None:
        super().__init__(cursor_type="row", zebra_stripes=False, cell_padding=1, **options)


COMMON = (
    ("up down j k", "choose a row"),
    ("home end", "first and last row"),
    ("enter", "open it"),
    ("escape", "back"),
    ("g", "go to a completion by its id"),
    ("r", "read again, of a run that goes on"),
    ("d", "dark or light"),
    ("q", "quit"),
)


class Help(ModalScreen[None]):
    """The keys of the screen below it."""

    DEFAULT_CSS = """
    Help { align: center middle; }
    Help > VerticalScroll { width: 76; height: auto; max-height: 90%; padding: 1 2; background: $surface;
        border: round $primary; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,question_mark,q,enter", "dismiss", "Close")]

    def __init__(self, keys: tuple[tuple[str, str], ...]) -> None:
        super().__init__()
        self.keys = keys

    def compose(self) -> ComposeResult:
        lines = [f"{key:<13}{what}" for key, what in (*self.keys, *COMMON)]
        with VerticalScroll():
            yield Static("\n".join(lines), markup=False)


class GoTo(ModalScreen[str]):
    """Asks for the id of a completion; the answer is empty when Escape is pressed."""

    DEFAULT_CSS = """
    GoTo { align: center middle; }
    GoTo > Input { width: 50; border: round $primary; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Close")]

    def compose(self) -> ComposeResult:
        yield Input(placeholder="00003-002-005, or e00024-0007 of an evaluation")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.dismiss(event.value.strip())

    def action_leave(self) -> None:
        self.dismiss("")
