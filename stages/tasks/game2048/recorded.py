"""A recorded game of 2048, board by board: the letters that were played and the game's seed give the same tiles again.

The program that played is not needed and never run. A recording that does not end as it was recorded is refused, so
that nobody is shown a game that did not happen.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from stages.tasks.game2048.rules import Game


class ReplayError(ValueError):
    """A recorded game that the rules do not replay to its recorded end."""


class Frame(NamedTuple):
    """The game after a move: exponents row by row, the score, and the letter played; "" at the start.

    appeared: the cell where a tile appeared, -1 where none did
    Example: Frame(board=bytes([0, 1, ...]), score=4, letter="A", appeared=7)
    """

    board: bytes
    score: int
    letter: str
    appeared: int


def frames(record: Mapping[str, Any], *, size: int, target: int) -> list[Frame]:
    """The boards of a recorded game (seed, letters, score, max_tile), its first one included.

    Raises ReplayError when its letters do not lead to its recorded end.
    """
    letters: str = record["letters"] or ""
    game = Game(record["seed"], size=size, target=target, max_moves=len(letters) + 1)
    found = [Frame(game.board, 0, "", -1)]
    for letter in letters.encode("ascii", "replace"):
        if letter not in b"WASD":
            raise ReplayError(f"game of seed {game.seed}: move {len(found)} is no letter of W, A, S, D")
        moved, _ = game.slide(letter)
        game.play(letter)
        if game.moves != len(found):
            raise ReplayError(f"game of seed {game.seed}: move {len(found)} changes nothing")
        appeared = next((cell for cell in range(size * size) if game.board[cell] != moved[cell]), -1)
        found.append(Frame(game.board, game.score, chr(letter), appeared))
    if (game.score, 1 << max(game.board)) != (record["score"], record["max_tile"]):
        raise ReplayError(
            f"game of seed {game.seed} replays to score {game.score} and tile {1 << max(game.board)}, "
            f"recorded are {record['score']} and {record['max_tile']}"
        )
    return found
