"""A grammar of short 2048 strategies in six families, good and bad mixed.

Contract: `write(rng, family)` returns the text of one program that defines `strategy(board)`; the same rng state gives
the same text. Families differ in what they look at, so that judging them gives a training run something to find:

    random      a letter by chance
    fixed       the first move that changes the board, in an order of the four letters
    greedy      the axis with more merges
    corner      two neighbouring directions as long as one of them moves
    snake       every move tried, the board after it weighed by position
    look_ahead  every move tried, the board after it judged by empty cells, pairs and tiles

About one program in ten carries a mistake: a wrong letter, a name that is missing, a check that is left out. Names,
constants and orders vary within a family, and so do scores. Position weights and slid rows are those of a 4x4 board;
on another board such programs play badly or not at all.
"""

import random
from collections.abc import Callable

from stages.tiny.look_ahead import write_look_ahead, write_snake

FAMILIES = ("random", "fixed", "greedy", "corner", "snake", "look_ahead")
SHARES = {"random": 0.13, "fixed": 0.14, "greedy": 0.16, "corner": 0.15, "snake": 0.23, "look_ahead": 0.19}
MISTAKES = 0.1

ORDERS = ("WASD", "ASDW", "SADW", "SDAW", "DSAW", "AWDS", "WDAS", "DWAS")


def block(*lines: str) -> str:
    """Joins lines with newlines, leaving out empty ones."""
    return "\n".join(line for line in lines if line)


def indent(text: str, *, depth: int = 1) -> str:
    """Returns text with every line moved right by depth steps of four spaces."""
    return "\n".join("    " * depth + line for line in text.split("\n"))


def write(rng: random.Random, family: str | None = None) -> str:
    """Returns one program of the family, or of a family drawn by SHARES."""
    if family is None:
        family = rng.choices(FAMILIES, [SHARES[name] for name in FAMILIES])[0]
    return WRITERS[family](rng)


def write_random(rng: random.Random) -> str:
    order = rng.choice((*ORDERS, "WWAASD", "AASSD", "ASD", "WAD"))
    if rng.random() < MISTAKES:
        order = rng.choice(("UDLR", "NESW"))
    form = rng.randrange(5)
    if form == 0:
        return block("import random", "", f"def strategy(board):\n    return random.choice('{order}')")
    if form == 1:
        letters = ", ".join(f"'{letter}'" for letter in order)
        return f"import random\n\nmoves = [{letters}]\n\ndef strategy(board):\n    return random.choice(moves)"
    if form == 2:
        top = len(order) if rng.random() > MISTAKES else len(order) + 1
        return f"import random\n\ndef strategy(board):\n    i = random.randrange({top})\n    return '{order}'[i]"
    if form == 3:
        weights = ", ".join(str(rng.choice((1, 2, 3, 4))) for _ in order)
        return f"import random\n\ndef strategy(board):\n    return random.choices('{order}', [{weights}])[0]"
    name = rng.choice(("move", "pick"))
    return f"from random import choice\n\ndef strategy(board):\n    {name} = choice('{order}')\n    return {name}"


def write_check(rng: random.Random) -> tuple[str, str]:
    """Returns a helper that says whether a move changes the board, and its name."""
    name = rng.choice(("can", "moves", "legal"))
    move = rng.choice("md")
    row = rng.choice(("row", "r"))
    test = rng.choice(("b and (a == 0 or a == b)", "b > 0 and a in (0, b)"))
    if rng.random() < MISTAKES:
        test = rng.choice(("a == b", "b and a == 0"))
    if rng.random() < 0.5:
        body = block(
            f"def {name}(board, {move}):",
            f"    rows = zip(*board) if {move} in 'WS' else board",
            f"    step = -1 if {move} in 'SD' else 1",
            f"    for {row} in rows:",
            f"        {row} = {row}[::step]",
            f"        for a, b in zip({row}, {row}[1:]):",
            f"            if {test}:",
            "                return True",
            "    return False",
        )
    else:
        body = block(
            f"def {name}(board, {move}):",
            f"    if {move} in 'WS':",
            "        board = list(zip(*board))",
            f"    if {move} in 'SD':",
            f"        board = [{row}[::-1] for {row} in board]",
            f"    return any({test} for {row} in board for a, b in zip({row}, {row}[1:]))",
        )
    return body, name


def write_fixed(rng: random.Random) -> str:
    order = rng.choice(ORDERS)
    draw = rng.random()
    if draw < 0.12:
        return f"import itertools\n\norder = itertools.cycle('{order}')\n\ndef strategy(board):\n    return next(order)"
    if draw < 0.22:
        return f"turn = 0\n\ndef strategy(board):\n    global turn\n    turn += 1\n    return '{order}'[turn % 4]"
    if draw < 0.30:
        return f"def strategy(board):\n    order = '{order}'\n    return order[sum(map(sum, board)) % 4]"
    check, can = write_check(rng)
    last = rng.choice((order[0], order[-1]))
    move = rng.choice(("m", "move"))
    if draw < 0.65:
        body = block(
            "def strategy(board):",
            f"    for {move} in '{order}':",
            f"        if {can}(board, {move}):",
            f"            return {move}",
            f"    return '{last}'",
        )
    elif draw < 0.85:
        body = (
            f"def strategy(board):\n    return next(({move} for {move} in '{order}' if {can}(board, {move})), '{last}')"
        )
    else:
        lines = "\n".join(f"    if {can}(board, '{letter}'):\n        return '{letter}'" for letter in order[:3])
        body = f"def strategy(board):\n{lines}\n    return '{order[3]}'"
    return f"{check}\n\n{body}"


def write_greedy(rng: random.Random) -> str:
    row = rng.choice(("row", "r"))
    across, down = rng.choice((("h", "v"), ("x", "y"), ("across", "down")))
    count = rng.choice(("a == b > 0", "a == b != 0", "a * (a == b)"))
    zeros = rng.random() < 0.4
    name = rng.choice(("merges", "count"))
    helper = block(
        f"def {name}(rows):",
        f"    rows = [[v for v in {row} if v] for {row} in rows]" if zeros else "",
        f"    return sum({count} for {row} in rows for a, b in zip({row}, {row}[1:]))",
    )
    counts = f"    {across} = {name}(board)\n    {down} = {name}(zip(*board))"
    if rng.random() < MISTAKES / 2:
        counts = f"    {across} = {name}(board)\n    {down} = {name}(board)"
    first, second = rng.choice(("AD", "DA")), rng.choice(("SW", "WS"))
    if rng.random() < 0.5:
        other = rng.choice(ORDERS)
        body = block(
            "def strategy(board):",
            counts,
            f"    if {across} > {down}:",
            f"        return '{first[0]}'",
            f"    if {down} > {across}:",
            f"        return '{second[0]}'",
            f"    return random.choice('{other}')",
        )
        imported = "import random\n\n" if rng.random() > MISTAKES / 2 else ""
        return f"{imported}{helper}\n\n{body}"
    check, can = write_check(rng)
    sign = rng.choice((">", ">="))
    body = block(
        "def strategy(board):",
        counts,
        f"    order = '{first + second}' if {across} {sign} {down} else '{second + first}'",
        "    for m in order:",
        f"        if {can}(board, m):",
        "            return m",
        f"    return '{first[0]}'",
    )
    return f"{helper}\n\n{check}\n\n{body}"


def write_corner(rng: random.Random) -> str:
    pair = rng.choice(("SA", "AS", "SD", "DS", "WA", "AW", "WD", "DW"))
    rest = [letter for letter in "ADSW" if letter not in pair]
    rng.shuffle(rest)
    third, last = rest
    check, can = write_check(rng)
    form = rng.randrange(4)
    if form == 0:
        body = block(
            "def strategy(board):",
            f"    for m in '{pair}':",
            f"        if {can}(board, m):",
            "            return m",
            f"    return '{third}' if {can}(board, '{third}') else '{last}'",
        )
    elif form == 1:
        body = block(
            "def strategy(board):",
            f"    good = [m for m in '{pair}' if {can}(board, m)]",
            "    if good:",
            "        return random.choice(good)",
            f"    return '{third}' if {can}(board, '{third}') else '{last}'",
        )
        imported = "import random\n\n" if rng.random() > MISTAKES / 2 else ""
        return f"{imported}{check}\n\n{body}"
    elif form == 2:
        corner = rng.choice(("board[0][0]", "board[3][0]", "board[0][3]", "board[3][3]"))
        body = block(
            "def strategy(board):",
            f"    top = {corner} == max(map(max, board))",
            f"    order = '{pair}' if top else '{pair[::-1]}'",
            f"    for m in order + '{third}{last}':",
            f"        if {can}(board, m):",
            "            return m",
            f"    return '{last}'",
        )
    else:
        body = block(
            "def strategy(board):",
            f"    if sum(map(sum, board)) % {rng.choice((3, 4, 8))}:",
            f"        order = '{pair}'",
            "    else:",
            f"        order = '{pair[::-1]}'",
            f"    for m in order + '{third}{last}':",
            f"        if {can}(board, m):",
            "            return m",
            f"    return '{last}'",
        )
    return f"{check}\n\n{body}"


WRITERS: dict[str, Callable[[random.Random], str]] = {
    "random": write_random,
    "fixed": write_fixed,
    "greedy": write_greedy,
    "corner": write_corner,
    "snake": write_snake,
    "look_ahead": write_look_ahead,
}
