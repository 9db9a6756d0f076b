#% counter
from collections import Counter

def strategy(board):
    tile, count = Counter(cell for row in board for cell in row if cell).most_common(1)[0]
    return "WASD"[(tile + count) % 4]
#% deque
from collections import deque

def strategy(board):
    queue = deque([(0, 0)], maxlen=64)
    seen = {(0, 0)}
    while queue:
        r, c = queue.popleft()
        for x, y in ((r + 1, c), (r, c + 1)):
            if x < 4 and y < 4 and (x, y) not in seen and board[x][y] == 0:
                seen.add((x, y))
                queue.append((x, y))
    return "WASD"[len(seen) % 4]
#% defaultdict
from collections import defaultdict

def strategy(board):
    places = defaultdict(list)
    for r, row in enumerate(board):
        for c, cell in enumerate(row):
            places[cell].append(r + c)
    return "ADWS"[sum(places[max(places)]) % 4]
#% ordered-dict
from collections import OrderedDict

def strategy(board):
    kept = OrderedDict((cell, None) for cell in sum(board, []))
    kept.move_to_end(0)
    return "WASD"[len(kept) % 4]
#% chain-map
import collections

defaults = {"first": "A", "second": "W"}

def strategy(board):
    return collections.ChainMap({"first": "S"} if board[0][0] else {}, defaults)["first"]
#% user-containers
from collections import UserDict, UserList, UserString

def strategy(board):
    cells = UserList(sum(board, []))
    letters = UserString("WASD")
    return str(letters[len([c for c in cells if c]) % 4])
#% abstract-classes
from collections.abc import Mapping, Sequence

class Board(Sequence):
    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, index):
        return self.rows[index]

    def __len__(self):
        return len(self.rows)

def strategy(board):
    rows = Board(board)
    return "A" if isinstance(rows, Sequence) and not isinstance(rows, Mapping) and 0 in rows[0] else "W"
#% heap
import heapq

def strategy(board):
    heap = [(-sum(row), index) for index, row in enumerate(board)]
    heapq.heapify(heap)
    heapq.heappush(heap, (-1, 3))
    return "WASD"[heapq.heappop(heap)[1]]
#% heap-nlargest
from heapq import merge, nlargest, nsmallest

def strategy(board):
    cells = sum(board, [])
    top = nlargest(3, cells) + nsmallest(2, cells) + list(merge([1, 3], [2]))
    return "WASD"[sum(top) // 2 % 4]
#% itertools-product
from itertools import product

def strategy(board):
    best = max(product(range(4), repeat=2), key=lambda p: (board[p[0]][p[1]], p))
    return "WASD"[sum(best) % 4]
#% itertools-permutations
import itertools

def strategy(board):
    orders = list(itertools.permutations("WASD"))
    return orders[sum(map(sum, board)) % len(orders)][0]
#% itertools-groupby
from itertools import groupby

def strategy(board):
    runs = max(len(list(group)) for row in board for _, group in groupby(row))
    return "WASD"[runs % 4]
#% itertools-chain-accumulate
from itertools import accumulate, chain

def strategy(board):
    sums = list(accumulate(chain.from_iterable(board)))
    return "WASD"[sums[len(sums) // 2] // 2 % 4]
#% itertools-pairwise
from itertools import pairwise, starmap, takewhile, zip_longest

def strategy(board):
    merges = sum(starmap(lambda a, b: a == b != 0, chain_pairs(board)))
    full = len(list(takewhile(all, board)))
    return "WASD"[(merges + full) % 4]

def chain_pairs(board):
    for row in board:
        yield from pairwise(row)
#% itertools-cycle-per-call
import itertools

def strategy(board):
    turns = itertools.cycle("AWAS")
    return [next(turns) for _ in range(1 + board[0].count(0))][-1]
#% itertools-tee-islice
from itertools import combinations, compress, count, islice, repeat, tee

def strategy(board):
    first, second = tee(iter(sum(board, [])))
    total = sum(islice(first, 8)) + sum(compress(second, repeat(1)))
    return "WASD"[(total + len(list(combinations("abc", 2))) + next(count(1))) % 4]
#% math-functions
import math

def strategy(board):
    value = sum(math.log2(cell) for row in board for cell in row if cell)
    return "WASD"[math.floor(value) % 4]
#% math-constants
from math import ceil, comb, gcd, hypot, inf, isclose, pi, prod, sqrt

def strategy(board):
    value = min(inf, hypot(3, 4) + gcd(12, 18) + comb(5, 2) + prod([2, 3]) + ceil(sqrt(2)) + int(pi))
    assert isclose(value, 5 + 6 + 10 + 6 + 2 + 3)
    return "WASD"[(int(value) + board[0][0]) % 4]
#% copy-deep
import copy

def strategy(board):
    other = copy.deepcopy(board)
    for row in other:
        row.reverse()
    shallow = copy.copy(board)
    assert shallow[0] is board[0] and other != 0
    return "A" if other[0][0] >= board[0][0] else "W"
#% typing-everything
from typing import Any, Callable, ClassVar, Dict, Final, Iterable, List, Literal, Optional, Tuple, Union, cast

Letter = Literal["W", "A", "S", "D"]
Grid = List[List[int]]
ORDER: Final[Tuple[str, ...]] = ("W", "A", "S", "D")

class Table:
    known: ClassVar[Dict[str, int]] = {"W": 0}

def strategy(board: Grid) -> Union[Letter, Optional[str]]:
    choose: Callable[[Iterable[int]], int] = lambda cells: sum(cells) // 2 % 4
    return cast(Any, ORDER[choose(board[0])])
#% typing-star
from typing import *

def strategy(board: List[List[int]]) -> Optional[str]:
    return "A" if board[0][0] else "W"
#% modern-hints
type_alias = dict[str, list[int]] | None

def strategy(board: list[list[int]]) -> str | None:
    moves: dict[str, int] = {letter: sum(row) for letter, row in zip("WASD", board)}
    return max(moves, key=moves.get)
#% future-annotations
from __future__ import annotations

def strategy(board: Board) -> Letter:
    return "D" if board[0][0] == 0 else "W"
#% import-as
import collections as c, itertools as it
import math as m

def strategy(board):
    return "WASD"[len(list(it.chain(*board))) * m.isqrt(16) * len(c.deque(board[0])) // 64 - 1 + (board[0][0] > 0)]
#% import-inside-the-function
def strategy(board):
    import math
    from collections import Counter
    return "WASD"[math.gcd(*Counter(board[0]).values()) % 4]
#% unused-imports
import math, random, itertools, collections, functools, heapq, copy, typing

def strategy(board):
    return "A" if board[0][0] else "S"
#% random-choice
import random

def strategy(board):
    return random.choice("WASD")
#% random-many-functions
import random

def strategy(board):
    order = list("WASD")
    random.shuffle(order)
    if random.random() < 0.25:
        return random.choices(order, weights=[1, 2, 3, 4])[0]
    return order[random.randint(0, 3)] if random.getrandbits(1) else random.sample(order, 2)[1]
#% random-with-its-own-seed
import random

def strategy(board):
    draw = random.Random(sum(map(sum, board)))
    return draw.choice("WASD") if draw.uniform(0, 1) < 0.7 else "A"
#% random-reseeded
import random

def strategy(board):
    random.seed(board[0][0] * 31 + board[3][3])
    return random.choice("WASD")
#% random-gauss
from random import gauss, randrange, triangular

def strategy(board):
    return "WASD"[int(abs(gauss(0, 2)) + triangular(0, 1)) % 4] if randrange(3) else "W"
#% monte-carlo
import random

def push(row):
    tiles = [t for t in row if t]
    out = []
    while tiles:
        if len(tiles) > 1 and tiles[0] == tiles[1]:
            out.append(2 * tiles.pop(0))
            tiles.pop(0)
        else:
            out.append(tiles.pop(0))
    return out + [0] * (4 - len(out))

def move(board, letter):
    if letter == "A":
        return [push(row) for row in board]
    if letter == "D":
        return [push(row[::-1])[::-1] for row in board]
    turned = move([list(c) for c in zip(*board)], "A" if letter == "W" else "D")
    return [list(c) for c in zip(*turned)]

def strategy(board):
    worth = {}
    for letter in "WASD":
        after = move(board, letter)
        if after == board:
            continue
        total = 0
        for _ in range(2):
            game = [row[:] for row in after]
            for _ in range(3):
                free = [(r, c) for r in range(4) for c in range(4) if not game[r][c]]
                if not free:
                    break
                r, c = random.choice(free)
                game[r][c] = 2
                game = move(game, random.choice("WASD"))
            total += sum(row.count(0) for row in game)
        worth[letter] = total
    return max(worth, key=worth.get) if worth else "A"
#% expectimax-two-deep
def slide(row):
    t = [x for x in row if x]
    i = 0
    while i < len(t) - 1:
        if t[i] == t[i + 1]:
            t[i] *= 2
            del t[i + 1]
        i += 1
    return t + [0] * (4 - len(t))

def after(b, m):
    if m in "WS":
        b = [list(x) for x in zip(*b)]
    b = [slide(r[::-1])[::-1] if m in "SD" else slide(r) for r in b]
    return [list(x) for x in zip(*b)] if m in "WS" else b

def value(b, depth):
    if depth == 0:
        return sum(r.count(0) for r in b)
    nexts = [after(b, m) for m in "WASD"]
    return max((value(n, depth - 1) for n in nexts if n != b), default=-1)

def strategy(board):
    options = [(value(after(board, m), 1), m) for m in "WASD" if after(board, m) != board]
    return max(options)[1] if options else "W"
#% memo-by-board
memo = {}

def strategy(board):
    key = tuple(map(tuple, board))
    if key not in memo:
        memo[key] = "WASD"[hash(key) % 2 + (board[0][0] > 2)]
    return memo[key]
#% sum-of-fractions-without-fractions
def strategy(board):
    numerator, denominator = 0, 1
    for cell in board[0]:
        numerator, denominator = numerator * (cell + 1) + denominator, denominator * (cell + 1)
    return "WASD"[numerator * 7 // denominator % 4]
#% complex-and-decimal-looking-numbers
def strategy(board):
    z = sum(complex(cell, 1) for cell in board[0]) * 1j
    return "WASD"[int(abs(z.real) + z.imag + 1e1 + 0x10 + 0b11 + 0o7 + 1_000) % 4]
#% bytes-and-memoryview
def strategy(board):
    data = bytearray(min(cell, 255) for row in board for cell in row)
    view = memoryview(data)[4:12]
    return "WASD"[(sum(view) + int.from_bytes(bytes(data[:2]), "big")) // 2 % 4]
#% frozenset-and-ranges
def strategy(board):
    present = frozenset(sum(board, []))
    return "WASD"[len(present & frozenset(range(0, 9, 2))) % 4]
#% zip-strict-and-enumerate-start
def strategy(board):
    total = 0
    for place, (a, b) in enumerate(zip(board[0], board[3], strict=True), start=1):
        total += place * (a > b)
    return "WASD"[total % 4]
#% divmod-pow-round
def strategy(board):
    q, r = divmod(sum(board[1]), 3)
    return "WASD"[(pow(3, q, 7) + round(r / 2)) % 4]
#% all-any-min-max-default
def strategy(board):
    if all(map(all, board)):
        return "W"
    return "S" if any(cell > 4 for cell in board[3]) else "D" if min((c for c in board[0] if c), default=0) > 2 else "A"
#% reversed-and-sorted
def strategy(board):
    backwards = list(reversed(board[0]))
    return "A" if sorted(board[0], reverse=True) == board[0] else "D" if backwards == sorted(backwards) else "W"
