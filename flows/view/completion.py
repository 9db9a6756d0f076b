"""One completion: its verdict, its tokens coloured by logprob, its program, its cases replayed, its prompt."""

import math
import re
from typing import Any, ClassVar

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import DataTable, Static, TabbedContent, TabPane

from flows.view import TABS
from flows.view.board import Board
from flows.view.code import numbered
from flows.view.page import OfRun, Rows
from flows.view.tokens import LEVELS, MODES, TokenView
from stages.artifacts.run import RunDir
from stages.runs import show, tables, tokens
from stages.runs.tables import printable
from stages.runs.tokens import Tokens
from stages.tasks import registry
from stages.tasks.game2048.task import Game2048

LINE = re.compile(r"\blines? (\d+(?:, \d+)*)")
LEGEND = "the stronger the less likely: below 90, 50, 10, 1 %"
assert len(LEVELS) == 5


class CompletionPage(OfRun):
    """`ids` are the completions among which n and p move; `row` is a baseline's, which has no id."""

    DEFAULT_CSS = """
    CompletionPage TabbedContent, CompletionPage ContentSwitcher, CompletionPage TabPane { height: 1fr; padding: 0; }
    CompletionPage VerticalScroll { padding: 0 1; }
    CompletionPage #figures { height: 3; padding: 0 1; background: $panel; }
    CompletionPage #list { width: 36; }
    CompletionPage #alone { width: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("1", f"tab('{TABS[0]}')", "Tabs", key_display="1-5"),
        *(Binding(str(at), f"tab('{name}')", show=False) for at, name in enumerate(TABS[1:], start=2)),
        Binding("n", "other(1)", "Others", key_display="n p"),
        Binding("p", "other(-1)", show=False),
    ]
    KEYS: ClassVar = (
        ("1 to 5", "verdict, tokens, program, cases, prompt"),
        ("n p", "next and previous completion of the list"),
        ("left right", "tokens: move the cursor; cases: step through a game"),
        ("u", "tokens: the next with less than one chance in ten"),
        ("l", "tokens: colour by engine, trainer, reference"),
        ("up down", "cases: choose a game"),
        ("space + -", "cases: play, faster, slower"),
        ("home end", "first and last token, move"),
    )

    def __init__(
        self,
        rundir: RunDir,
        ids: list[str],
        completion_id: str,
        *,
        tab: str | None = None,
        row: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(rundir, f"> {completion_id}")
        self.ids, self.completion_id, self.row = ids, completion_id, row
        self.first_tab = tab or TABS[0]
        self.shown: dict[str, Any] = {}
        self.of_task = registry.of(rundir.config())

    def body(self) -> ComposeResult:
        with TabbedContent(initial=self.first_tab):
            with TabPane("Verdict", id="verdict"), VerticalScroll():
                yield Static(id="facts", markup=False)
            with TabPane("Tokens", id="tokens"), Vertical():
                yield TokenView()
                yield Static(id="figures", markup=False)
            with TabPane("Program", id="program"), VerticalScroll():
                yield Static(id="source", markup=False)
            with TabPane(self.of_task.cases.capitalize(), id="cases"), Horizontal():
                if isinstance(self.of_task, Game2048):
                    yield GameList(id="list")
                    yield Board(size=self.of_task.options.size, target=self.of_task.options.target)
                else:
                    yield Rows(id="alone")
            with TabPane("Prompt", id="prompt"), VerticalScroll():
                yield Static(id="texts", markup=False)

    def read(self) -> tuple[dict[str, Any], Tokens]:
        if self.row is not None:
            return {**self.row, self.of_task.cases: self.row[self.of_task.cases] or []}, Tokens([], worded=False)
        return show.completion(self.rundir, self.completion_id), tokens.of(self.rundir, self.completion_id)

    def fill(self, found: tuple[dict[str, Any], Tokens]) -> None:
        row, spoken = found
        self.shown = row
        source = row.get("program") or ""
        self.query_one("#facts", Static).update(self.verdict(row))
        self.query_one("#source", Static).update(
            numbered(source, marked=marked_lines(row)) if source else "The completion holds no program."
        )
        text: list[RenderableType] = [Text(printable(row.get("prompt") or "No prompt is kept of an evaluation."))]
        text += [Rule("completion", style="dim"), Text(printable(row.get("completion") or ""))]
        self.query_one("#texts", Static).update(Group(*text))
        self.worded = spoken.worded
        self.query_one(TokenView).show(spoken.tokens)
        self.fill_cases(row[self.of_task.cases])
        self.focus_tab()

    def verdict(self, row: dict[str, Any]) -> RenderableType:
        parts: list[RenderableType] = [tables.facts(row, task=self.of_task, whole=True)]
        evidence = tables.evidence(row)
        if evidence.plain:
            parts += [Rule("evidence", style="dim"), evidence]
        if row[self.of_task.cases]:
            parts += [Rule(self.of_task.cases, style="dim"), tables.cases(row[self.of_task.cases], self.of_task)]
        return Group(*parts)

    def fill_cases(self, cases: list[dict[str, Any]]) -> None:
        table = self.query_one("#cases").query_one(Rows)
        table.clear(columns=True)
        replayed = isinstance(table, GameList)
        names = [name for name in self.of_task.case_columns if name != self.of_task.recording]
        if replayed:
            names = ["score", "max_tile", "moves", "state"]
        table.add_columns(*("tile" if name == "max_tile" else name.replace("_", " ") for name in names))
        for at, case in enumerate(cases):
            good = case.get("state") in self.of_task.good_states
            table.add_row(
                *(
                    Text(tables.cell(case[name]), style="green" if good and name == "state" else "", justify="right")
                    for name in names
                ),
                key=str(at),
            )
        if replayed and not cases:
            self.query_one(Board).update(f"No {self.of_task.cases} were played.")

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        if isinstance(event.data_table, GameList) and event.row_key.value is not None:
            self.query_one(Board).show(self.shown[self.of_task.cases][int(event.row_key.value)])

    def on_token_view_moved(self, event: TokenView.Moved) -> None:
        self.query_one("#figures", Static).update(self.told())

    def told(self) -> Text:
        """The token under the cursor, in two lines."""
        view = self.query_one(TokenView)
        token = view.token
        if token is None:
            return Text("No tokens are kept of this completion.")
        figures = [
            f"{name} {value:.3f}" if value is not None else ""
            for name, value in (("engine", token.engine), ("trainer", token.trainer), ("reference", token.reference))
        ]
        chance = "" if token.engine is None else f", sampled with {100 * math.exp(token.engine):.3g} %"
        legend = LEGEND if view.mode == MODES[0] else "green: likelier for the first, red: less likely"
        words = "" if self.worded else "; the tokenizer is not here, so ids are shown"
        return Text.assemble(
            f"token {view.at + 1} of {len(view.tokens)}, id {token.id}  ",
            (ascii(token.text)[:40] if self.worded else "", "bold"),
            f"\nlogprob {'  '.join(filter(None, figures))}{chance}\n",
            (f"colour: {view.mode}; {legend}{words}", "dim"),
        )

    def on_tabbed_content_tab_activated(self, event: TabbedContent.TabActivated) -> None:
        self.focus_tab()

    def focus_tab(self) -> None:
        """Gives the keys to what the open tab shows."""
        for pane in self.query(TabPane):
            if pane.id == self.query_one(TabbedContent).active:
                for kind in (TokenView, Rows, VerticalScroll):
                    for widget in pane.query(kind):
                        widget.focus()
                        return

    def action_tab(self, name: str) -> None:
        self.query_one(TabbedContent).active = name

    def action_other(self, by: int) -> None:
        if self.completion_id in self.ids:
            at = self.ids.index(self.completion_id) + by
            if 0 <= at < len(self.ids):
                self.completion_id = self.ids[at]
                self.heading = f"{self.rundir.path.name} > {self.completion_id}"
                self.begin()


class GameList(Rows):
    """The games of a completion; the arrow keys sideways, space, + and - are the board's."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select_cursor", show=False),
        Binding("space", "board('play')", "Play"),
        Binding("left", "board('step', -1)", "Move", key_display="\u2190\u2192"),
        Binding("right", "board('step', 1)", show=False),
        Binding("home", "board('jump', 0)", show=False),
        Binding("end", "board('jump', -1)", show=False),
        Binding("plus,equals_sign", "board('faster', 1)", "Speed", key_display="+ -"),
        Binding("minus", "board('faster', -1)", show=False),
    ]

    def action_board(self, name: str, *values: int) -> None:
        getattr(self.screen.query_one(Board), f"action_{name}")(*values)


def marked_lines(row: dict[str, Any]) -> set[int]:
    """The lines of the program that the verdict's detail and the kept state speak of."""
    told = f"{row.get('detail') or ''}\n{row.get('state_kept') or ''}"
    return {int(number) for match in LINE.finditer(told) for number in match[1].split(", ")}
