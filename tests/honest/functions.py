#% closure
def make(order):
    def play(board):
        return order[sum(row.count(0) for row in board) % len(order)]
    return play

strategy = make("WASDA")
#% closure-over-a-loop
chosen = [lambda board, letter=letter: letter for letter in "WASD"]

def strategy(board):
    return chosen[board[0].count(0) % 4](board)
#% late-binding-closure
rules = [lambda board: "WASD"[i] for i in range(4)]

def strategy(board):
    return rules[0](board) if board[0][0] else "A"
#% default-arguments
def strategy(board, order="AWDS", *, step=3):
    return order[sum(map(len, filter(any, board))) * step % 4]
#% mutable-default-used-as-a-table
def score(row, table={0: 0, 2: 1, 4: 3, 8: 7}):
    return sum(table.get(cell, cell) for cell in row)

def strategy(board):
    return "A" if score(board[0]) > score(board[3]) else "S" if score(board[3]) else "W"
#% star-args
def add(*numbers, **options):
    return sum(numbers) % options.get("modulus", 4)

def strategy(*args, **kwargs):
    (board,) = args
    return "WASD"[add(*board[0], *board[1], modulus=4, **kwargs)]
#% positional-only
def corner(board, /, *, row=0, column=0):
    return board[row][column]

def strategy(board, /):
    return "W" if corner(board, row=-1) else "A"
#% recursion
def total(cells):
    return cells[0] + total(cells[1:]) if cells else 0

def strategy(board):
    return "WASD"[total(sum(board, [])) // 2 % 4]
#% mutual-recursion
def even(n):
    return True if n == 0 else odd(n - 1)

def odd(n):
    return False if n == 0 else even(n - 1)

def strategy(board):
    return "A" if even(sum(cell > 0 for row in board for cell in row)) else "W"
#% deep-recursion
def depth(n):
    return 0 if n == 0 else 1 + depth(n - 1)

def strategy(board):
    return "WA"[depth(600 + board[0][0]) % 2]
#% decorator-of-its-own
def remembering(function):
    def wrapper(*args):
        letter = function(*args)
        return letter if letter in "WASD" else "A"
    return wrapper

@remembering
def strategy(board):
    return "WASD?"[sum(board[0]) % 5]
#% decorator-with-arguments
def choosing(*letters):
    def decorate(function):
        def wrapper(board):
            return letters[function(board) % len(letters)]
        return wrapper
    return decorate

@choosing("A", "W", "A", "S")
def strategy(board):
    return sum(board[1]) // 2
#% stacked-decorators
def lower(f):
    return lambda b: f(b).lower()

def upper(f):
    return lambda b: f(b).upper()

@upper
@lower
def strategy(board):
    return "A" if board[0][0] else "W"
#% decorator-that-is-a-class
class Counted:
    def __init__(self, function):
        self.function = function

    def __call__(self, board):
        return self.function(board)

@Counted
def strategy(board):
    return "D" if board[1][1] else "S"
#% functools-wraps
import functools

def checked(function):
    @functools.wraps(function)
    def wrapper(board):
        letter = function(board)
        assert letter in "WASD", wrapper.__name__
        return letter
    return wrapper

@checked
def strategy(board):
    """Plays by the middle."""
    return "WASD"[(board[1][1] + board[2][2]) // 2 % 4]
#% functools-update-wrapper
from functools import update_wrapper

def inner(board):
    "the inner one"
    return "A"

def strategy(board):
    return inner(board) if board[0][0] else "W"

update_wrapper(strategy, inner)
assert strategy.__name__ == "inner" and strategy.__doc__ == "the inner one"
#% functools-partial
from functools import partial

def pick(order, board):
    return order[board[3].count(0) % 4]

strategy = partial(pick, "ADWS")
#% functools-reduce
from functools import reduce

def strategy(board):
    return "WASD"[reduce(lambda a, b: (a * 3 + b) % 1009, sum(board, []), 1) % 4]
#% functools-lru-cache
from functools import lru_cache

@lru_cache(maxsize=None)
def worth(row):
    return sum(cell * place for place, cell in enumerate(row))

def strategy(board):
    values = [worth(tuple(row)) for row in board]
    return "WASD"[values.index(max(values))]
#% functools-cache-on-recursion
import functools

@functools.cache
def ways(n):
    return n if n < 2 else ways(n - 1) + ways(n - 2)

def strategy(board):
    return "WASD"[ways(20 + board[0].count(0)) % 4]
#% functools-total-ordering
from functools import total_ordering

@total_ordering
class Move:
    def __init__(self, letter, worth):
        self.letter, self.worth = letter, worth

    def __eq__(self, other):
        return self.worth == other.worth

    def __lt__(self, other):
        return self.worth < other.worth

def strategy(board):
    columns = list(zip(*board))
    moves = [Move("W", sum(columns[0])), Move("A", sum(board[0])), Move("D", sum(board[-1]) + 1)]
    return max(moves).letter
#% functools-singledispatch
from functools import singledispatch

@singledispatch
def size(thing):
    return 1

@size.register
def _(thing: list):
    return sum(size(part) for part in thing)

@size.register(int)
def _(thing):
    return thing

def strategy(board):
    return "WASD"[size(board) // 2 % 4]
#% functools-cmp-to-key
from functools import cmp_to_key

def compare(a, b):
    return (a[0] > b[0]) - (a[0] < b[0]) or (a[1] < b[1]) - (a[1] > b[1])

def strategy(board):
    moves = [(sum(board[i]), "WASD"[i]) for i in range(4)]
    return sorted(moves, key=cmp_to_key(compare))[-1][1]
#% cached-property
from functools import cached_property

class View:
    def __init__(self, board):
        self.board = board

    @cached_property
    def filled(self):
        return sum(cell > 0 for row in self.board for cell in row)

def strategy(board):
    view = View(board)
    return "WASD"[(view.filled + view.filled) // 2 % 4]
#% generator-function
def cells(board):
    for row in board:
        yield from row

def strategy(board):
    return "WASD"[sum(1 for cell in cells(board) if cell > 2) % 4]
#% generator-with-send
def averager():
    total = count = 0
    value = yield
    while True:
        total += value
        count += 1
        value = yield total // count

def strategy(board):
    running = averager()
    next(running)
    for row in board:
        mean = running.send(sum(row))
    running.close()
    return "WASD"[mean % 4]
#% infinite-generator
import itertools

def letters():
    while True:
        yield from "WASD"

def strategy(board):
    return next(itertools.islice(letters(), sum(board[0]), None))
#% generator-left-open
def endless():
    n = 0
    while True:
        n += 1
        yield n

left = endless()
next(left)

def strategy(board):
    return "WA"[next(endless()) % 2]
#% nested-functions-three-deep
def strategy(board):
    def outer(x):
        def middle(y):
            def inner(z):
                return (x + y + z) // 2 % 4
            return inner
        return middle
    return "WASD"[outer(board[0][0])(board[1][1])(board[2][2])]
#% nonlocal-counter
def strategy(board):
    count = 0
    def visit(row):
        nonlocal count
        for cell in row:
            if cell:
                count += 1
    for row in board:
        visit(row)
    return "SDWA"[count % 4]
#% function-attributes
def strategy(board):
    return strategy.order[sum(board[2]) // 2 % 4]

strategy.order = "AWSD"
#% entry-is-a-bound-method
class Player:
    def __init__(self, order):
        self.order = order

    def move(self, board):
        return self.order[board[0].count(0) % len(self.order)]

strategy = Player("AAWD").move
#% entry-is-an-instance
class Player:
    def __call__(self, board):
        return "W" if board[0][0] < board[0][3] else "A"

strategy = Player()
#% entry-is-a-static-method
class Player:
    @staticmethod
    def move(board):
        return "A" if board[0][0] == 0 else "S"

strategy = Player.move
#% entry-is-a-class-method
class Player:
    letters = "WDSA"

    @classmethod
    def move(cls, board):
        return cls.letters[sum(board[0]) // 2 % 4]

strategy = Player.move
#% entry-defined-in-a-branch
if 1 + 1 == 2:
    def strategy(board):
        return "W" if board[0][1] else "A"
else:
    def strategy(board):
        return "X"
#% entry-defined-twice
def strategy(board):
    return "X"

def strategy(board):
    return "D" if board[3][3] == 0 else "W"
#% entry-defined-in-a-loop
for letter in "WA":
    def strategy(board, letter=letter):
        return letter if board[0][0] else "S"
#% entry-defined-in-a-try
try:
    import math
except ImportError:
    math = None

def strategy(board):
    return "WASD"[math.isqrt(sum(map(sum, board))) % 4]
#% lambda-in-a-conditional
strategy = (lambda b: "A") if len("abc") == 3 else (lambda b: "W")
#% y-combinator
Y = lambda f: (lambda x: x(x))(lambda x: f(lambda *a: x(x)(*a)))
count = Y(lambda me: lambda cells: 0 if not cells else (cells[0] > 0) + me(cells[1:]))

def strategy(board):
    return "WASD"[count(sum(board, [])) % 4]
#% map-filter-zip
def strategy(board):
    return "WASD"[len(list(filter(None, map(lambda a, b: a == b, board[0], board[1])))) % 4]
#% sorting-with-a-key
def strategy(board):
    order = sorted(range(4), key=lambda r: (-sum(board[r]), r))
    return "WASD"[order[0]]
