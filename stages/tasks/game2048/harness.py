"""Both ends of the pipe between the supervisor, which holds the games, and the process of the program that plays them.

A message asks for one move on each running game; every game of a job moves in lockstep, so a round trip is paid once a
round.
    question: size (1 byte), the seed for the program's own `random` (8 bytes), then size * size exponents a board
    answer:   one byte a board, one of W A S D; anything else ends that game
The program gets lists made anew for every call, in another process than the games: what it writes into them reaches
nothing.
Its `random` is seeded, so that the same program on the same games gives the same verdict whenever it is judged.

The sandbox ships this file behind rules.py as one text and runs `judge` in the supervisor, `serve` in the program's
process.
"""

from stages.tasks.game2048.rules import Game

LETTERS = {"W": 87, "A": 65, "S": 83, "D": 68}
ILLEGAL = 0
HEADER_BYTES = 9


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


def play(games, letters):  # type: ignore[no-untyped-def]
    """Plays one letter in each game."""
    for game, letter in zip(games, letters, strict=True):
        game.play(letter)


def serve(function, receive, send):  # type: ignore[no-untyped-def]
    """Answers questions with what `function(board)` returns, until there are none; its exceptions go to the sandbox."""
    import random

    values = [0] + [1 << exponent for exponent in range(1, 256)]
    seeded = False
    while question := receive():
        size = question[0]
        if not seeded:
            random.seed(int.from_bytes(question[1:HEADER_BYTES], "little"))
            seeded = True
        tiles = [values[exponent] for exponent in question[HEADER_BYTES:]]
        rows = [tiles[start : start + size] for start in range(0, len(tiles), size)]
        letters = ask_all(function, [rows[start : start + size] for start in range(0, len(rows), size)])
        send(bytes([LETTERS.get(letter, ILLEGAL) if type(letter) is str else ILLEGAL for letter in letters]))


def ask_all(function, boards):  # type: ignore[no-untyped-def]
    """Returns what the program answers to each board."""
    return [function(board) for board in boards]
