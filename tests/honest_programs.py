"""The honest programs in tests/honest, and the games that they play outside any sandbox.

A file holds sections: a line `#% name` and the program under it; `newline=crlf` or `newline=none` after the name
changes its line ends. The game here is written for the tests: it slides tiles one by one, and shares nothing with the
judge but the rule which random number places which tile.
"""

import contextlib
import io
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

from tests.test_game2048_rules import slow_move

FOLDER = Path(__file__).parent / "honest"


class Honest(NamedTuple):
    name: str
    program: str


def load() -> list[Honest]:
    """All programs, in the order of the files."""
    found = []
    for path in sorted(FOLDER.glob("*.py")):
        parts = re.split(r"^#% (.+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert parts[0] == ""
        for title, program in zip(parts[1::2], parts[2::2], strict=True):
            name, *options = title.split()
            if "newline=crlf" in options:
                program = program.replace("\n", "\r\n")
            if "newline=none" in options:
                program = program.rstrip("\n")
            found.append(Honest(name, program))
    return found


class SlowGame:
    """2048 on rows of tiles, with the fields that a verdict has."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case
        self.draw = random.Random(case["seed"])
        self.rows = [[0] * case["size"] for _ in range(case["size"])]
        self.letters = ""
        self.score = self.wasted = 0
        self.state = ""
        self.spawn()
        self.spawn()

    def spawn(self) -> None:
        """One number r in [0, 1): of n free cells in row order, the one at int(r n); a 4 if the rest < 0.1."""
        free = [(r, c) for r, row in enumerate(self.rows) for c, tile in enumerate(row) if not tile]
        place, rest = divmod(self.draw.random() * len(free), 1)
        r, c = free[int(place)]
        self.rows[r][c] = 4 if rest < 0.1 else 2

    def play(self, answer: object) -> None:
        if type(answer) is not str or answer not in ("W", "A", "S", "D"):
            self.state = "illegal"
            return
        moved, gained = slow_move(self.rows, answer)
        if moved == self.rows:
            self.wasted += 1
            self.state = "illegal" if self.wasted == 10 else ""
            return
        self.wasted = 0
        self.letters += answer
        self.rows = moved
        self.score += gained
        if max(map(max, moved)) >= self.case["target"]:
            self.state = "won"
            return
        self.spawn()
        if all(slow_move(self.rows, letter)[0] == self.rows for letter in "WASD"):
            self.state = "stuck"
        elif len(self.letters) == self.case["max_moves"]:
            self.state = "move_limit"

    def record(self) -> dict[str, Any]:
        return {
            "seed": self.case["seed"],
            "moves": len(self.letters),
            "max_tile": max(map(max, self.rows)),
            "score": self.score,
            "state": self.state,
            "letters": self.letters,
        }


def played(program: str, cases: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    """The records of a program's games, played in lockstep in this process, with `random` seeded as by the judge."""
    names: dict[str, Any] = {"__name__": "program"}
    state = random.getstate()
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(program, "<program>", "exec", dont_inherit=True), names)
        random.seed(cases[0]["program_seed"])
        games = [SlowGame(case) for case in cases]
        while running := [game for game in games if not game.state]:
            answers = [names["strategy"]([row[:] for row in game.rows]) for game in running]
            for game, answer in zip(running, answers, strict=True):
                game.play(answer)
    random.setstate(state)
    return [game.record() for game in games]
