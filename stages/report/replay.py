"""A recorded game of 2048 as the page replays it: the first board, then one short code a move."""

import string
from dataclasses import asdict, dataclass

from stages.artifacts.history import PlayedGame
from stages.tasks.game2048.recorded import ReplayError, frames

__all__ = ["CELLS", "EXPONENTS", "Replay", "ReplayError", "replay"]
CELLS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
EXPONENTS = "0123456789abcdefghijklmnop"


@dataclass(frozen=True)
class Replay:
    """One game for the page.

    start: exponents of the first board, row by row, one base-36 digit a cell
    moves: three characters a move: the letter, the cell where a tile appeared (A-Za-z0-9+/) and its exponent; "--" for
        the cell and exponent of a move that ended the game before a tile appeared
    Example: Replay(size=4, target=2048, seed=7, start="0100000000010000", moves="AF1WB1", score=4, max_tile=4,
                    state="stuck")
    """

    size: int
    target: int
    seed: int
    start: str
    moves: str
    score: int
    max_tile: int
    state: str


def replay(game: PlayedGame, *, size: int, target: int) -> Replay:
    """The recorded game as a Replay; ReplayError when its letters do not lead to its recorded end."""
    first, *moves = frames(asdict(game), size=size, target=target)
    codes = [
        move.letter + (CELLS[move.appeared] + EXPONENTS[move.board[move.appeared]] if move.appeared >= 0 else "--")
        for move in moves
    ]
    return Replay(
        size=size,
        target=target,
        seed=game.seed,
        start="".join(EXPONENTS[exponent] for exponent in first.board),
        moves="".join(codes),
        score=game.score,
        max_tile=game.max_tile,
        state=game.state,
    )
