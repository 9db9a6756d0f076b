"""The tokens of a completion, each on a colour that says how unlikely it was, and a cursor that tells its figures."""

import math
from typing import ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.color import Color
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from stages.runs.tables import printable
from stages.runs.tokens import Token

# Probability below which a token gets each colour: strength of the warning colour over the background.
LEVELS = ((0.9, 0.0), (0.5, 0.16), (0.1, 0.34), (0.01, 0.55), (0.0, 0.8))
MODES = ("engine", "trainer - engine", "trainer - reference")
SURPRISING = math.log(0.1)
SCALES = {"trainer - engine": 0.1, "trainer - reference": 2.0}  # nats that get the full colour


class TokenView(ScrollView, can_focus=True):
    """Example: view.show(stages.runs.tokens.of(run, "00003-002-005").tokens)"""

    DEFAULT_CSS = (
        "TokenView { height: 1fr; background: $background; padding: 0 1; overflow-x: hidden; overflow-y: scroll; }"
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "move(-1)", "Token", key_display="\u2190\u2192"),
        Binding("right", "move(1)", show=False),
        Binding("up,k", "line(-1)", show=False),
        Binding("down,j", "line(1)", show=False),
        Binding("home", "ends(0)", show=False),
        Binding("end", "ends(-1)", show=False),
        Binding("u", "surprise", "Unlikely"),
        Binding("l", "mode", "Colour"),
    ]

    class Moved(Message):
        """The cursor is on another token, or the colours mean something else."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[Token] = []
        self.lines: list[list[tuple[str, int]]] = []
        self.places: dict[int, int] = {}
        self.at = 0
        self.mode = MODES[0]

    @property
    def token(self) -> Token | None:
        return self.tokens[self.at] if self.tokens else None

    def show(self, tokens: list[Token]) -> None:
        """Shows these tokens, the cursor on the first."""
        self.tokens, self.at = tokens, 0
        if self.value(0) is None:
            self.mode = MODES[0]
        self.wrap()
        self.scroll_to(0, 0, animate=False)
        self.post_message(self.Moved())

    def value(self, index: int) -> float | None:
        """What a token is coloured by, nats; None where it was not measured."""
        if index >= len(self.tokens):
            return None
        token = self.tokens[index]
        if self.mode == MODES[0]:
            return token.engine
        other = token.engine if self.mode == MODES[1] else token.reference
        return None if token.trainer is None or other is None else token.trainer - other

    def wrap(self) -> None:
        """Lays the tokens out in lines as wide as the widget."""
        width = max(10, self.scrollable_content_region.width or 80)
        lines: list[list[tuple[str, int]]] = [[]]
        self.places, used = {}, 0
        for index, token in enumerate(self.tokens):
            for part in token.text.replace("\t", "    ").replace("\n", "\u21b5\n").splitlines(keepends=True) or [""]:
                text = printable(part.rstrip("\n"))
                while text:
                    if used >= width or (used and used + cell_len(text) > width and cell_len(text) <= width):
                        lines.append([])
                        used = 0
                    cut = len(text)
                    while cell_len(text[:cut]) > width - used:
                        cut -= 1
                    cut = max(cut, 1)
                    lines[-1].append((text[:cut], index))
                    self.places.setdefault(index, len(lines) - 1)
                    used += cell_len(text[:cut])
                    text = text[cut:]
                if part.endswith("\n"):
                    lines.append([])
                    used = 0
            self.places.setdefault(index, len(lines) - 1)
        self.lines = lines
        self.virtual_size = Size(width, len(lines))
        self.refresh()

    def render_line(self, y: int) -> Strip:
        at = y + self.scroll_offset.y
        width = self.scrollable_content_region.width
        ground = Color.parse(self.app.theme_variables["background"])
        plain = Style(bgcolor=ground.rich_color)
        if at >= len(self.lines):
            return Strip.blank(width, plain)
        parts = [Segment(text, self.style_of(index, ground)) for text, index in self.lines[at]]
        return Strip(parts).adjust_cell_length(width, plain)

    def style_of(self, index: int, ground: Color) -> Style:
        variables = self.app.theme_variables
        if index == self.at and self.has_focus:
            return Style(bgcolor=Color.parse(variables["primary"]).rich_color, color=ground.rich_color, bold=True)
        back = self.colour(self.value(index), ground)
        front = Color.parse(variables["foreground"])
        marker = self.tokens[index].text.startswith("<|")
        return Style(bgcolor=back.rich_color, color=front.rich_color, italic=marker, underline=False)

    def colour(self, value: float | None, ground: Color) -> Color:
        """The background of a token with this value."""
        variables = self.app.theme_variables
        if value is None:
            return ground
        if self.mode == MODES[0]:
            probability = math.exp(min(value, 0.0))
            strength = next(strength for above, strength in LEVELS if probability >= above)
            return ground.blend(Color.parse(variables["warning"]), strength)
        strength = min(1.0, abs(value) / SCALES[self.mode]) * 0.7
        return ground.blend(Color.parse(variables["success" if value > 0 else "error"]), strength)

    def move_to(self, index: int) -> None:
        if self.tokens:
            self.at = max(0, min(len(self.tokens) - 1, index))
            self.scroll_to_region(Region(0, self.places[self.at], 1, 1), animate=False)
            self.refresh()
            self.post_message(self.Moved())

    def action_move(self, by: int) -> None:
        self.move_to(self.at + by)

    def action_line(self, by: int) -> None:
        """To the first token that begins on the next line with one, or the last that does above."""
        here = self.places.get(self.at, 0)
        if by > 0:
            found = [index for index, line in self.places.items() if line > here]
            self.move_to(min(found, default=self.at))
        else:
            above = [line for line in self.places.values() if line < here]
            self.move_to(min((i for i, line in self.places.items() if above and line == max(above)), default=self.at))

    def action_ends(self, index: int) -> None:
        self.move_to(len(self.tokens) - 1 if index else 0)

    def action_surprise(self) -> None:
        """To the next token that had less than one chance in ten, from the top again after the last."""
        unlikely = [i for i, token in enumerate(self.tokens) if token.engine is not None and token.engine < SURPRISING]
        self.move_to(next((i for i in unlikely if i > self.at), min(unlikely, default=self.at)))

    def action_mode(self) -> None:
        """Colours by the next thing that was measured."""
        for _ in MODES:
            self.mode = MODES[(MODES.index(self.mode) + 1) % len(MODES)]
            if self.value(0) is not None:
                break
        else:
            self.mode = MODES[0]
        self.refresh()
        self.post_message(self.Moved())

    def on_resize(self, event: events.Resize) -> None:
        self.wrap()

    def on_click(self, event: events.Click) -> None:
        line = self.lines[event.y + self.scroll_offset.y] if event.y + self.scroll_offset.y < len(self.lines) else []
        column = event.x - 1
        for text, index in line:
            column -= cell_len(text)
            if column < 0:
                self.move_to(index)
                return
