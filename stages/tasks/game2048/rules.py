"""The game of 2048, played by whoever asks: standard merge rules on a size x size board, one move at a time.

Runs inside the sandbox's supervisor, so it needs nothing but the standard library and stands alone when its text is
shipped.

A board is `bytes` of size * size exponents in row order: 0 is empty, 1 is a tile of 2, 11 a tile of 2048. A move looks
up each line in a table of lines already slid, which is filled as lines are met. The tiles that appear depend on the
game's seed and its own moves alone.

Example:
    game = Game(7, size=4, target=2048, max_moves=5000)
    while not game.state:
        game.play(ord("A"))
    game.record()   # {"seed": 7, "moves": 9, "max_tile": 8, "score": 28, "state": "illegal", "letters": "AAAAAAAAA"}
"""

import random

MAX_WASTED = 10  # letters in a row that move nothing; the 10th ends the game
FOUR_CHANCE = 0.1
MAX_LINES = (
    1 << 17
)  # lines a table keeps: all that 4x4 games up to 2048 can show are 20 736, an entry takes about 200 bytes


class LineTable(dict):  # type: ignore[type-arg]
    """Maps a line of exponents to (the line slid towards its first or its last cell, score of its merges)."""

    def __init__(self, *, to_last: bool) -> None:
        super().__init__()
        self.to_last = to_last

    def __missing__(self, line: bytes) -> tuple[bytes, int]:
        cells = line[::-1] if self.to_last else line
        slid = bytearray()
        gained = 0
        mergeable = False
        for exponent in cells:
            if exponent == 0:
                continue
            if mergeable and slid[-1] == exponent:
                slid[-1] = exponent + 1
                gained += 2 << exponent
                mergeable = False
            else:
                slid.append(exponent)
                mergeable = True
        slid.extend(bytes(len(cells) - len(slid)))
        if len(self) >= MAX_LINES:
            self.clear()
        self[line] = entry = (bytes(slid[::-1] if self.to_last else slid), gained)
        return entry


TO_FIRST = LineTable(to_last=False)
TO_LAST = LineTable(to_last=True)


def lines_of(size: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Returns the slices of a board's rows and of its columns."""
    rows = tuple(slice(start, start + size) for start in range(0, size * size, size))
    columns = tuple(slice(start, None, size) for start in range(size))
    return rows, columns


class Game:
    """One game: `board`, `score`, `moves` (those that changed the board) and `state`, empty while the game goes on.

    state: won (a tile of `target`), stuck (nothing can move), illegal (an answer that is no letter, or 10 letters in a
    row that moved nothing), move_limit; the judge sets timeout.
    """

    __slots__ = (
        "board",
        "columns",
        "letters",
        "max_moves",
        "random",
        "rows",
        "score",
        "seed",
        "state",
        "target",
        "wasted",
    )

    def __init__(self, seed: int, *, size: int, target: int, max_moves: int) -> None:
        if not 3 <= size <= 8:
            raise ValueError(f"a board of size {size}: sizes are 3 to 8")
        if target < 8 or target & (target - 1) or target > 1 << 17:
            raise ValueError(f"a target of {target}: targets are powers of two from 8 to 131072")
        self.seed = seed
        self.random = random.Random(seed).random
        self.rows, self.columns = lines_of(size)
        self.target = target.bit_length() - 1
        self.max_moves = max_moves
        self.letters = bytearray()
        self.score = 0
        self.wasted = 0
        self.state = ""
        self.board = bytes(size * size)
        self.spawn(self.board)
        self.spawn(self.board)

    @property
    def moves(self) -> int:
        return len(self.letters)

    def slide(self, letter: int) -> tuple[bytes, int]:
        """Returns the board that the letter makes, before a tile appears, and the score of its merges; W A S D only."""
        board = self.board
        gained = 0
        lines = []
        if letter == 65 or letter == 68:  # A, D: rows
            table = TO_FIRST if letter == 65 else TO_LAST
            for where in self.rows:
                line, merged = table[board[where]]
                lines.append(line)
                gained += merged
            return b"".join(lines), gained
        table = TO_FIRST if letter == 87 else TO_LAST  # W, S: columns
        for where in self.columns:
            line, merged = table[board[where]]
            lines.append(line)
            gained += merged
        transposed = b"".join(lines)
        return b"".join([transposed[where] for where in self.columns]), gained

    def spawn(self, board: bytes) -> None:
        """Puts a 2, or one time in ten a 4, on an empty cell of `board`, all cells alike, by one random number."""
        drawn = self.random() * board.count(0)
        index = int(drawn)
        rest = board.split(b"\0", index + 1)[-1]
        self.board = board[: -len(rest) - 1] + (b"\2" if drawn - index < FOUR_CHANCE else b"\1") + rest

    def play(self, letter: int) -> None:
        """Plays the letter, given as a byte; anything but W, A, S, D ends the game."""
        if letter not in b"WASD":
            self.state = "illegal"
            return
        moved, gained = self.slide(letter)
        if moved == self.board:
            self.wasted += 1
            if self.wasted == MAX_WASTED:
                self.state = "illegal"
            return
        self.wasted = 0
        self.letters.append(letter)
        if gained:
            self.score += gained
            if self.target in moved:
                self.board = moved
                self.state = "won"
                return
        self.spawn(moved)
        if 0 not in self.board and self.is_stuck():
            self.state = "stuck"
        elif len(self.letters) >= self.max_moves:
            self.state = "move_limit"

    def is_stuck(self) -> bool:
        """Says whether no letter would change a full board."""
        board = self.board
        return not any(TO_FIRST[board[where]][1] for where in self.rows + self.columns)

    def record(self) -> dict[str, object]:
        """Returns the game as the scores table holds it."""
        return {
            "seed": self.seed,
            "moves": self.moves,
            "max_tile": 1 << max(self.board),
            "score": self.score,
            "state": self.state,
            "letters": self.letters.decode("ascii"),
        }
