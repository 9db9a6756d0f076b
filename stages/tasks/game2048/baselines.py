"""Strategies to compare with, as program texts under the model's own contract: they are judged as its answers are.

random draws among the letters that move something; fixed_order takes the first of A, S, D, W that does; greedy takes
the one that merges the most; look_ahead makes each move and keeps the board with many empty cells and lines that only
rise or only fall.

Means of 400 games on 4x4 are in tests/test_game2048_baselines.py.
"""

_SLIDE = """\
def slide(row):
    tiles = [tile for tile in row if tile]
    for i in range(1, len(tiles)):
        if tiles[i - 1] == tiles[i]:
            tiles[i - 1] *= 2
            tiles[i] = 0
    tiles = [tile for tile in tiles if tile]
    return tiles + [0] * (len(row) - len(tiles))

def after(board, letter):
    if letter == "A":
        return [slide(row) for row in board]
    if letter == "D":
        return [slide(row[::-1])[::-1] for row in board]
    columns = [list(column) for column in zip(*board)]
    return [list(row) for row in zip(*after(columns, "A" if letter == "W" else "D"))]
"""

RANDOM = (
    "import random\n\n"
    + _SLIDE
    + """
def strategy(board):
    letters = [letter for letter in "ASDW" if after(board, letter) != board]
    return random.choice(letters or ["A"])
"""
)

FIXED_ORDER = (
    _SLIDE
    + """
def strategy(board):
    for letter in "ASDW":
        if after(board, letter) != board:
            return letter
    return "A"
"""
)

GREEDY = """\
def merged(lines):
    total = 0
    for line in lines:
        last = 0
        for tile in line:
            if tile:
                if tile == last:
                    total += 2 * tile
                    last = 0
                else:
                    last = tile
    return total

def can_move(line):
    empty = False
    last = 0
    for tile in line:
        if tile == 0:
            empty = True
        elif empty or tile == last:
            return True
        else:
            last = tile
    return False

def strategy(board):
    columns = list(zip(*board))
    best, choice = -1, "A"
    for letter, lines, gain in (("A", board, 0), ("D", [row[::-1] for row in board], 0),
                                ("W", columns, 0), ("S", [column[::-1] for column in columns], 0)):
        if any(can_move(line) for line in lines):
            gain = merged(lines)
            if gain > best:
                best, choice = gain, letter
    return choice
"""

LOOK_AHEAD = (
    _SLIDE
    + """
def value(board):
    levels = [[tile.bit_length() for tile in row] for row in board]
    empty = sum(row.count(0) for row in levels)
    disorder = 0
    for line in levels + list(zip(*levels)):
        falls = rises = 0
        last = line[0]
        for level in line:
            if level < last:
                falls += last - level
            else:
                rises += level - last
            last = level
        disorder += min(falls, rises)
    return 2 * empty - disorder

def strategy(board):
    best, choice = None, "A"
    for letter in "AWSD":
        moved = after(board, letter)
        if moved != board:
            worth = value(moved)
            if best is None or worth > best:
                best, choice = worth, letter
    return choice
"""
)

BASELINES = {"random": RANDOM, "fixed_order": FIXED_ORDER, "greedy": GREEDY, "look_ahead": LOOK_AHEAD}
