"""A recorded game of 2048 on a board of characters, replayed by keys."""

from collections.abc import Mapping
from typing import Any, ClassVar

from rich.style import Style
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.timer import Timer
from textual.widgets import Static

from stages.tasks.game2048.recorded import Frame, ReplayError, frames

# Background of each exponent, 1 to 11 and beyond: the report's colours.
TILES = ("#efe6d8", "#ecdcb9", "#f3bd84", "#f19f63", "#e06a42", "#d9503f", "#cf4459", "#b93d74", "#983a8b", "#743f9d",
         "#4f46a8", "#2f3f8f")  # fmt: skip
WAYS = {"": "start", "W": "up", "A": "left", "S": "down", "D": "right"}
SPEEDS = (3, 8, 30, 90)  # moves a second


class Board(Static, can_focus=True):
    """The board after one move of a game, and what is known of it."""

    DEFAULT_CSS = "Board { width: auto; height: auto; padding: 0 1; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "play", "Play", key_display="space"),
        Binding("left", "step(-1)", "Move", key_display="\u2190\u2192"),
        Binding("right", "step(1)", show=False),
        Binding("home", "jump(0)", show=False),
        Binding("end", "jump(-1)", show=False),
        Binding("plus,equals_sign", "faster(1)", "Speed", key_display="+ -"),
        Binding("minus", "faster(-1)", show=False),
    ]

    def __init__(self, *, size: int, target: int) -> None:
        super().__init__()
        self.edge, self.target = size, target
        self.frames: list[Frame] = []
        self.state = ""
        self.at = 0
        self.speed = SPEEDS[1]
        self.timer: Timer | None = None

    def show(self, game: Mapping[str, Any]) -> None:
        """Shows the end of this game; one that its letters do not replay is told instead."""
        self.stop()
        try:
            self.frames = frames(game, size=self.edge, target=self.target)
        except (ReplayError, ValueError) as error:
            self.frames = []
            self.update(Text(f"This game cannot be replayed.\n{error}"))
            return
        self.state = str(game["state"])
        self.go(len(self.frames) - 1)

    def go(self, index: int) -> None:
        if self.frames:
            self.at = max(0, min(len(self.frames) - 1, index))
            self.update(Text("\n").join([self.told(), self.drawn()]))

    def told(self) -> Text:
        """Score, largest tile, move and its letter."""
        frame, last = self.frames[self.at], len(self.frames) - 1
        what = self.state.replace("_", " ") if self.at == last else WAYS[frame.letter]
        playing = f"  {self.speed} moves/s" if self.timer else ""
        return Text.assemble(
            ("score ", "dim"), (f"{frame.score:<7}", "bold"), ("largest ", "dim"),
            (f"{1 << max(frame.board):<6}\n", "bold"), ("move ", "dim"), f"{self.at} of {last}  ", (what, "bold"),
            playing, "\n",
        )  # fmt: skip

    def drawn(self) -> Text:
        """The board, a tile 6 characters wide and 3 lines high, 2 where it would not fit."""
        frame = self.frames[self.at]
        width, height = (7, 3) if self.edge <= 4 else (7, 2) if self.edge <= 6 else (7, 1)
        lines = []
        for row in range(self.edge):
            for line in range(height):
                text = Text()
                for column in range(self.edge):
                    cell = row * self.edge + column
                    exponent = frame.board[cell]
                    label = str(1 << exponent) if exponent and line == height // 2 else ""
                    if cell == frame.appeared and label:
                        label = f"+{label}"
                    text.append(label.center(width), style_of(exponent))
                lines.append(text)
        return Text("\n").join(lines)

    def stop(self) -> None:
        if self.timer:
            self.timer.stop()
            self.timer = None

    def action_play(self) -> None:
        if self.timer:
            self.stop()
            self.go(self.at)
            return
        if self.at >= len(self.frames) - 1:
            self.go(0)
        self.timer = self.set_interval(1 / self.speed, self.tick)

    def tick(self) -> None:
        if self.at >= len(self.frames) - 2:
            self.stop()
        self.go(self.at + 1)

    def action_step(self, by: int) -> None:
        self.stop()
        self.go(self.at + by)

    def action_jump(self, index: int) -> None:
        self.stop()
        self.go(len(self.frames) - 1 if index else 0)

    def action_faster(self, by: int) -> None:
        self.speed = SPEEDS[max(0, min(len(SPEEDS) - 1, SPEEDS.index(self.speed) + by))]
        if self.timer:
            self.stop()
            self.timer = self.set_interval(1 / self.speed, self.tick)
        self.go(self.at)


def style_of(exponent: int) -> Style:
    """The colours of a tile."""
    if not exponent:
        return Style(bgcolor="#8a8175", color="#8a8175", dim=False)
    return Style(
        bgcolor=TILES[min(exponent, len(TILES)) - 1], color="#3a3027" if exponent <= 4 else "#ffffff", bold=True
    )
