"""A recorded game of 2048 as the page replays it: the first board, then one short code a move.

The program that played is not needed and never run: the letters it played were recorded when it was judged, and the
task's rules with the game's seed make the same tiles appear. A recording that does not end as it was recorded is
refused, so the page never shows a game that did not happen.
"""

import string
from dataclasses import dataclass

from stages.artifacts.history import PlayedGame
from stages.tasks.game2048.rules import Game

CELLS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
EXPONENTS = "0123456789abcdefghijklmnop"


class ReplayError(ValueError):
    """A recorded game that the rules do not replay to its recorded end."""


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
    played = Game(game.seed, size=size, target=target, max_moves=len(game.letters) + 1)
    start = "".join(EXPONENTS[exponent] for exponent in played.board)
    moves: list[str] = []
    for letter in game.letters.encode("ascii"):
        moved, _ = played.slide(letter)
        played.play(letter)
        appeared = [cell for cell in range(size * size) if played.board[cell] != moved[cell]]
        if played.moves != len(moves) + 1:
            raise ReplayError(f"game of seed {game.seed}: move {len(moves) + 1} changes nothing")
        moves.append(chr(letter) + ("".join(CELLS[c] + EXPONENTS[played.board[c]] for c in appeared) or "--"))
    if (played.score, 1 << max(played.board)) != (game.score, game.max_tile):
        raise ReplayError(
            f"game of seed {game.seed} replays to score {played.score} and tile {1 << max(played.board)}, "
            f"recorded are {game.score} and {game.max_tile}"
        )
    return Replay(
        size=size,
        target=target,
        seed=game.seed,
        start=start,
        moves="".join(moves),
        score=game.score,
        max_tile=game.max_tile,
        state=game.state,
    )
