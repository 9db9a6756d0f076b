"""The two families of the grammar that try every move on a copy of the board: look_ahead and snake.

Contract: as in strategies.py. Both slide the rows in Python; a move costs 24-79 us of CPython 3.12 on one idle core.
What tells them apart, and what the score rests on, is how the board after the move is judged.
"""

import random

MISTAKES = 0.07  # in each of the two functions
ORDERS = ("WASD", "ASDW", "SADW", "DSAW")
GRADIENTS = (
    ((6, 5, 4, 3), (5, 4, 3, 2), (4, 3, 2, 1), (3, 2, 1, 0)),
    ((7, 5, 3, 2), (5, 3, 2, 1), (3, 2, 1, 0), (2, 1, 0, 0)),
    ((9, 6, 4, 2), (6, 4, 2, 1), (4, 2, 1, 0), (2, 1, 0, 0)),
    ((4, 3, 2, 1), (3, 2, 1, 0), (2, 1, 0, 0), (1, 0, 0, 0)),
)
SNAKES = (
    ((15, 14, 13, 12), (8, 9, 10, 11), (7, 6, 5, 4), (0, 1, 2, 3)),
    ((15, 14, 13, 12), (11, 10, 9, 8), (7, 6, 5, 4), (3, 2, 1, 0)),
    ((9, 8, 7, 6), (5, 4, 3, 2), (4, 3, 2, 1), (3, 2, 1, 0)),
)


def turned(weights: tuple[tuple[int, ...], ...], turns: int) -> list[list[int]]:
    """Returns the weights turned by quarter turns, so that each corner gets its share."""
    rows = [list(row) for row in weights]
    for _ in range(turns):
        rows = [list(row) for row in zip(*rows[::-1], strict=True)]
    return rows


def write_slide(rng: random.Random) -> tuple[str, str]:
    """Returns a helper that slides one row to the left, and its name."""
    name = rng.choice(("slide", "push", "squash"))
    v = rng.choice("vx")
    mistake = rng.random() < MISTAKES
    if rng.random() < 0.5:
        doubled = rng.choice(("2 * r[i], 0", "r[i] * 2, 0"))
        if mistake:
            doubled = "r[i] * 2, r[i]"
        return (
            f"def {name}(row):\n"
            f"    r = [{v} for {v} in row if {v}]\n"
            "    for i in range(len(r) - 1):\n"
            "        if r[i] == r[i + 1]:\n"
            f"            r[i], r[i + 1] = {doubled}\n"
            f"    r = [{v} for {v} in r if {v}]\n"
            "    return r + [0] * (4 - len(r))"
        ), name
    last = f"last = {v}" if mistake else "last = 0"
    return (
        f"def {name}(row):\n"
        "    r, last = [], 0\n"
        f"    for {v} in row:\n"
        f"        if {v} and {v} == last:\n"
        "            r[-1] *= 2\n"
        f"            {last}\n"
        f"        elif {v}:\n"
        f"            r.append({v})\n"
        f"            last = {v}\n"
        "    return r + [0] * (4 - len(r))"
    ), name


def write_loop(rng: random.Random, slide: str, value: str, *, turn_back: bool) -> str:
    """Returns strategy(board), which tries each move and keeps the one whose board `b` has the highest value."""
    best, s = rng.choice((("best", "s"), ("top", "value")))
    m = rng.choice("md")
    low = rng.choice(("-1", "-1e9", "0"))
    order = rng.choice(ORDERS)
    lines = [
        "def strategy(board):",
        f"    {best}, pick = {low}, '{order[0]}'",
        f"    for {m} in '{order}':",
        f"        k = -1 if {m} in 'SD' else 1",
        f"        rows = [list(c) for c in zip(*board)] if {m} in 'WS' else board",
        f"        b = [{slide}(r[::k])[::k] for r in rows]",
        "        if b == rows:",
        "            continue",
    ]
    if rng.random() < MISTAKES:
        del lines[-2:]
    if turn_back:
        lines += [f"        if {m} in 'WS':", "            b = [list(c) for c in zip(*b)]"]
    lines += [
        f"        {s} = {value}",
        f"        if {s} > {best}:",
        f"            {best}, pick = {s}, {m}",
        "    return pick",
    ]
    return "\n".join(lines)


EMPTY = "sum(r.count(0) for r in b)"
PAIRS = "sum(x == y for r in b for x, y in zip(r, r[1:]))"
BOTH = "sum(x == y for r in b + list(zip(*b)) for x, y in zip(r, r[1:]))"


def write_look_ahead(rng: random.Random) -> str:
    slide, name = write_slide(rng)
    empty = rng.choice((EMPTY, "sum(v == 0 for r in b for v in r)"))
    edge = rng.choice(("b[0][0]", "b[3][3]", "sum(b[0])", "sum(b[3])"))
    value = rng.choice(
        (
            empty,
            empty,
            f"{rng.choice((2, 3, 4))} * {empty} + {PAIRS}",
            f"{rng.choice((2, 3, 4))} * {empty} + {BOTH}",
            f"{empty} + {BOTH}",
            PAIRS,
            BOTH,
            "max(map(max, b))",
            "sum(v * v for r in b for v in r)",
            f"max(map(max, b)) + {rng.choice((10, 20, 50, 100))} * {empty}",
            f"{edge} + {rng.choice((10, 20, 50, 100))} * {empty}",
        )
    )
    return f"{slide}\n\n{write_loop(rng, name, value, turn_back=False)}"


def write_snake(rng: random.Random) -> str:
    slide, name = write_slide(rng)
    turns = rng.randrange(4)
    draw = rng.random()
    weights = turned(rng.choice(GRADIENTS if draw < 0.4 else SNAKES), turns)
    cells = "[" + ", ".join(str(cell) for row in weights for cell in row) + "]"
    power = rng.choice((0, 2, 2, 2, 4)) if draw >= 0.4 else rng.choice((0, 0, 2))
    head = f"W = {cells}" if not power else f"W = [{power} ** k for k in {cells}]"
    dot = "sum(w * v for w, v in zip(W, sum(b, [])))"
    scales = (50, 100, 200, 500) if not power else (1000, 5000, 20000, 50000)
    scale = rng.choice(scales)
    forms = ("", f" + {scale} * {EMPTY}", f" + {scale} * ({EMPTY} + {PAIRS})", f" + {scale} * ({EMPTY} + {BOTH})")
    bonus = rng.choices(forms, (1, 2, 2, 5))[0]
    return f"{head}\n\n{slide}\n\n{write_loop(rng, name, dot + bonus, turn_back=True)}"
