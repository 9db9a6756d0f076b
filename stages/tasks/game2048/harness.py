"""Both ends of the pipe between the supervisor, which holds the games, and the process of the program that plays them.

A message asks for one move on each running game; every game of a job moves in lockstep, so a round trip is paid once a
round.
    question: size (1 byte), the seed for the program's own `random` (8 bytes; it is seeded when this changes), then
              size * size exponents a board
    answer:   one byte a board, one of W A S D; anything else ends that game
The program gets lists made anew for every call, in another process than the games: what it writes into them reaches
nothing.
Its `random` is seeded, so that the same program on the same games gives the same verdict whenever it is judged.

When the games are over `probe` asks about other boards to see what the moves depend on. It comes last, so that neither
the games nor the random numbers they were played with know of it.

The sandbox ships this file behind rules.py as one text and runs `judge` in the supervisor, `serve` in the program's
process.
"""

import functools
import random

from stages.tasks.game2048.rules import Game

LETTERS = {"W": 87, "A": 65, "S": 83, "D": 68}
ILLEGAL = 0
HEADER_BYTES = 9
PROBES = 7  # boards of a probe; a prime, so that a program that counts its calls by 2, 3, 4 or 5 is seen to


def judge(cases, ask):  # type: ignore[no-untyped-def]
    """Plays all games to their end and returns their records in the order of the cases.

    cases: dicts with seed, size, target, max_moves and program_seed; size and program_seed are those of the first.
    ask(question) -> answer raises an exception with `outcome` when the program ended: running games then end where
    they stand, as timeout or as illegal, and the supervisor keeps the outcome.
    """
    games = [
        Game(case["seed"], size=case["size"], target=case["target"], max_moves=case["max_moves"]) for case in cases
    ]
    header = bytes([cases[0]["size"]]) + cases[0]["program_seed"].to_bytes(8, "little")
    running = games
    while running:
        try:
            answer = ask(header + b"".join([game.board for game in running]))
        except Exception as ended:
            outcome = getattr(ended, "outcome", None)
            if outcome is None:
                raise
            for game in running:
                game.state = "timeout" if outcome == "timeout" else "illegal"
            break
        if len(answer) != len(running):
            answer = bytes(len(running))
        play(running, answer)
        running = [game for game in running if not game.state]
    return [game.record() for game in games]


def probe(cases, ask):  # type: ignore[no-untyped-def]
    """Says what the moves depend on: {"depends_on_board", "depends_on_calls", "depends_on_random"}, None is unknown.

    Seven boards are asked about three times, twice with the same random numbers and once with others, and the first of
    them seven times. Moves that differ while board and random numbers are the same come of the program's own state; of
    such a program nothing else is known.
    """
    size, seed = cases[0]["size"], cases[0]["program_seed"]

    def moves(boards, offset):  # type: ignore[no-untyped-def]
        return ask(bytes([size]) + ((seed + offset) % (1 << 64)).to_bytes(8, "little") + b"".join(boards))

    boards = boards_of(size)
    first, other, again = (moves(boards, offset) for offset in (1, 2, 1))
    alike = moves(boards[:1] * PROBES, 2)
    stateful = first != again
    return {
        "depends_on_board": None if stateful else other != alike,
        "depends_on_calls": stateful or first != other,
        "depends_on_random": None if stateful else first != other,
    }


@functools.cache
def boards_of(size):  # type: ignore[no-untyped-def]
    """Returns the boards of a probe, in mid-game; each ends with one letter played until it moves nothing."""
    boards = []
    for number in range(PROBES):
        game = Game(number, size=size, target=1 << 17, max_moves=1000)
        for letter in random.Random(number).choices(b"WASD", k=10 + 4 * number) + [b"WASD"[number % 4]] * 4:
            if not game.state:
                game.play(letter)
        boards.append(game.board)
    return boards


def play(games, letters):  # type: ignore[no-untyped-def]
    """Plays one letter in each game."""
    for game, letter in zip(games, letters, strict=True):
        game.play(letter)


def serve(function, receive, send):  # type: ignore[no-untyped-def]
    """Answers questions with what `function(board)` returns, until there are none; its exceptions go to the sandbox."""
    values = [0] + [1 << exponent for exponent in range(1, 256)]
    seed = b""
    while question := receive():
        size = question[0]
        if question[1:HEADER_BYTES] != seed:
            seed = question[1:HEADER_BYTES]
            random.seed(int.from_bytes(seed, "little"))
        tiles = [values[exponent] for exponent in question[HEADER_BYTES:]]
        rows = [tiles[start : start + size] for start in range(0, len(tiles), size)]
        letters = ask_all(function, [rows[start : start + size] for start in range(0, len(rows), size)])
        send(bytes([LETTERS.get(letter, ILLEGAL) if type(letter) is str else ILLEGAL for letter in letters]))


def ask_all(function, boards):  # type: ignore[no-untyped-def]
    """Returns what the program answers to each board."""
    return [function(board) for board in boards]
