"""The check of a program's text: what it refuses and where, what it lets pass, and what state it names."""

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "containers" / "sandbox"
ENTRY = "strategy"


@pytest.fixture(scope="module")
def program():
    """The module as the sandbox has it, its random numbers left as they are."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("program")
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("program", "state"):
            sys.modules.pop(name, None)


def refused(program, source):
    with pytest.raises(program.Refused) as caught:
        program.compile_checked(source, entry=ENTRY, guarded=True)
    return caught.value.outcome, caught.value.detail


def noted(program, source):
    return json.loads(program.compile_checked(source, entry=ENTRY, guarded=True).notes)


@pytest.mark.parametrize(
    ("source", "outcome", "detail"),
    [
        ("import math\nimport os, sys\n", "foreign_import", "line 2: imports os: import os, sys (and 1 more)"),
        ("import os.path as math\n", "foreign_import", "line 1: imports os.path: import os.path as math"),
        (
            "def f():\n    from time import sleep\n",
            "foreign_import",
            "line 2: imports from time: from time import sleep",
        ),
        ("from . import x\n", "foreign_import", "line 1: imports from .: from . import x"),
        ("x = 1\n\nm = __import__('os')\n", "cheat", "line 3: uses __import__: m = __import__('os')"),
        ("exec('import os')\n", "cheat", "line 1: uses exec(): exec('import os')"),
        ("def f(b):\n    return eval('b')\n", "cheat", "line 2: uses eval(): return eval('b')"),
        (
            "def strategy(b):\n    x = 1\n    return strategy.__globals__['x']\n",
            "cheat",
            "line 3: reaches for .__globals__: return strategy.__globals__['x']",
        ),
        (
            "x = [].__class__.__base__\n",
            "cheat",
            "line 1: reaches for .__base__: x = [].__class__.__base__ (and 1 more)",
        ),
        ("g = (n for n in [])\ng.gi_frame\n", "cheat", "line 2: reaches for .gi_frame: g.gi_frame"),
        ("globals()['x'] = 1\n", "cheat", "line 1: uses globals(): globals()['x'] = 1"),
        ("from random import __builtins__\n", "cheat", "line 1: imports __builtins__: from random import __builtins__"),
        (
            "match 1:\n    case object(__class__=k): pass\n",
            "cheat",
            "line 2: matches __class__: case object(__class__=k): pass",
        ),
        ("\f\nx = '\x1c \u2028'\nopen('x')\n", "cheat", "line 3: uses open(): open('x')"),
        ("open('" + "x" * 200 + "')\n", "cheat", "line 1: uses open(): open('" + "x" * 71 + "..."),
    ],
)
def test_what_is_refused_is_named_with_its_line_and_the_line_is_quoted(program, source, outcome, detail):
    assert refused(program, source) == (outcome, detail)


def sections(text):
    """The programs of a text by their heading."""
    return dict(part.split("\n", 1) for part in text.split("### ")[1:])


LEGAL = sections("""
### constants
SIZE = 4
ORDER = ('W', 'A')
def strategy(board):
    return ORDER[len(board) % 2]
### a table computed at module level
TABLE = {}
for n in range(9):
    TABLE[n] = n * n
SQUARES = [n * n for n in range(9)]
SQUARES.append(81)
def strategy(board):
    return 'WA'[TABLE[board[0][0]] % 2 + SQUARES[0]]
### a table filled by a function at module level
TABLE = {}
def fill():
    for n in range(9):
        TABLE[n] = n
fill()
def strategy(board):
    return 'WASD'[TABLE[board[0][0]] % 4]
### helpers with their own lists
def moved(row):
    out = []
    for n in row:
        out.append(n)
    out[0] = 1
    return out
def strategy(board):
    return 'W' if moved(board[0]) else 'A'
### a nested search with nonlocal
def strategy(board):
    best = 0
    memo = {}
    def search(depth):
        nonlocal best
        best = max(best, depth)
        memo[depth] = best
        return depth and search(depth - 1)
    search(3)
    return 'W' if best else 'A'
print(strategy([[0]]))
### writing into its own board
def strategy(board):
    board[0][0] = 2
    board.sort()
    return 'W'
### a class made in each call
class Mind:
    def __init__(self, board):
        self.board = board
        self.n = 0
    def think(self):
        self.n += 1
        return 'WA'[self.n % 2]
def strategy(board):
    return Mind(board).think()
### a default that is a constant
def strategy(board, order='WASD', weights=(1, 2), table={1: 2}):
    return order[table[1] - 2]
### a cache that lives in the call
import functools
def strategy(board):
    @functools.lru_cache(None)
    def search(n):
        return n and search(n - 1)
    return 'WA'[search(4)]
### drawing lots
import random
def strategy(board):
    return random.choice('WASD')
### a local that has a global's name
seen = []
def strategy(board):
    seen = list(board)
    seen.append(1)
    return 'W'
### a method that is called like a dunder's
def strategy(board):
    return 'W' if (1).__add__(1) and board else 'A'
### iterators and lists made anew
import itertools
def moves(board):
    return ['W']
def strategy(board):
    first = next(itertools.cycle('WASD'))
    moves(board).append(first)
    sorted(board).sort()
    return moves(board).pop()
### classes that are told of their subclasses
class Rule:
    rules = []
    def __init_subclass__(cls):
        Rule.rules.append(cls)
class Up(Rule):
    move = 'W'
def strategy(board):
    return Rule.rules[0].move if board else 'A'
### heap and deque of its own
import heapq
from collections import deque
def strategy(board):
    heap, line = [], deque()
    heapq.heappush(heap, 1)
    line.append(heapq.heappop(heap))
    return 'W' if line and board else 'A'
""")


@pytest.mark.parametrize("heading", LEGAL)
def test_honest_programs_pass_and_keep_no_state(program, heading):
    assert noted(program, LEGAL[heading])["state"] == ""


STATE = sections("""
### a counter -> line 4: writes global n
n = 0
def strategy(board):
    global n
    n += 1
    return 'WASD'[n % 4]
### a list of boards -> line 3: changes SEEN, a module-level object
SEEN = []
def strategy(board):
    SEEN.append(board)
    return 'W'
### a memo -> line 3: changes MEMO, a module-level object
MEMO = {}
def look(b):
    MEMO[b] = 1
    return 1
def strategy(board):
    return 'WA'[look(str(board))]
### a mutable default -> line 2: changes seen, a mutable default
def strategy(board, seen=[]):
    seen.append(1)
    return 'WA'[len(seen) % 2]
### a keyword's mutable default -> line 2: changes seen, a mutable default
def strategy(board, *, seen={}):
    seen[1] = 2
    return 'W'
### a function's attribute -> line 2: changes strategy, a module-level object
def strategy(board):
    strategy.n = getattr(strategy, 'n', 0) + 1
    return 'W'
strategy.n = 0
### a cache -> line 2: keeps results of look in a cache
from functools import lru_cache
@lru_cache(maxsize=None)
def look(n):
    return n
def strategy(board):
    return 'WA'[look(0)]
### a cache made by a call -> line 4: keeps results in a cache
import functools
def look(n):
    return n
fast = functools.cache(look)
def strategy(board):
    return 'WA'[fast(0)]
### a closure -> line 5: writes n
def make():
    n = 0
    def play(board):
        nonlocal n
        n += 1
        return 'WASD'[n % 4]
    return play
strategy = make()
### a closure's list -> line 3: changes seen, a variable that a result of make() keeps
def make():
    seen = []
    return lambda board: seen.append(1) or 'W'
strategy = make()
### a decorator's closure -> line 4: changes calls, a variable that a result of counted() keeps
def counted(f):
    calls = [0]
    def play(board):
        calls[0] += 1
        return f(board)
    return play
@counted
def strategy(board):
    return 'W'
### an instance -> line 5: changes self, of a class instantiated at module level
class Mind:
    def __init__(self):
        self.n = 0
    def move(self, board):
        self.n += 1
        return 'W'
MIND = Mind()
def strategy(board):
    return MIND.move(board)
### an instance that is the entry -> line 3: changes self, of a class instantiated at module level
class Mind:
    def __call__(self, board):
        self.n = 1
        return 'W'
strategy = Mind()
### a class attribute -> line 4: changes Mind, a module-level object
class Mind:
    n = 0
def strategy(board):
    Mind.n += 1
    return 'WA'[Mind.n % 2]
### a generator -> line 4: changes TURN, a module-level object
import itertools
TURN = itertools.cycle('WASD')
def strategy(board):
    return next(TURN)
### a heap -> line 4: changes H, a module-level object
import heapq
H = [1]
def strategy(board):
    heapq.heappush(H, 2)
    return 'W'
### a patched module -> line 3: changes random, an imported module
import random
def strategy(board):
    random.n = 1
    return 'W'
### an item deep inside -> line 3: changes GRID, a module-level object; line 4: changes GRID, a module-level object
GRID = [[0]]
def strategy(board):
    GRID[0][0] = 1
    del GRID[0][0]
    return 'W'
### a setdefault -> line 3: changes D, a module-level object
D = {}
def strategy(board):
    D.setdefault(1, []).append(2)
    return 'W'
""")


@pytest.mark.parametrize("heading", STATE)
def test_state_kept_between_calls_is_named_with_its_line_and_not_refused(program, heading):
    assert noted(program, STATE[heading])["state"] == heading.partition(" -> ")[2]


def test_many_lines_of_state_are_counted_rather_than_listed(program):
    body = "".join(f"    D[{n}] = 1\n" for n in range(9))
    assert noted(program, f"D = {{}}\ndef strategy(board):\n{body}    return 'W'\n")["state"].endswith("; and 5 more")


@pytest.mark.parametrize(
    ("source", "reads"),
    [
        ("def strategy(board):\n    return 'W'\n", False),
        ("strategy = lambda board: 'W'\n", False),
        ("n = 0\ndef strategy(board):\n    global n\n    n += 1\n    return 'WASD'[n % 4]\n", False),
        ("def strategy(board):\n    return 'WA'[len(board) % 2]\n", True),
        ("def strategy(board):\n    def look():\n        return board\n    return 'W' if look() else 'A'\n", True),
        ("def strategy(*boards):\n    return 'W'\n", None),
        ("class A:\n    def __call__(self, board):\n        return 'W'\nstrategy = A()\n", None),
        ("def strategy(board):\n    return 'W'\ndef strategy(board):\n    return 'A'\n", None),
    ],
)
def test_a_program_that_never_reads_its_argument_is_seen(program, source, reads):
    assert noted(program, source)["reads_argument"] is reads


def test_reading_state_never_refuses_a_program_that_compiles(program):
    deep = "x = " + "lambda: " * 60 + "0\nstrategy = lambda board: x\n"
    assert noted(program, deep)["state"] == ""
    wide = "def strategy(board):\n" + "    board = board + board\n" * 8000
    assert noted(program, wide)["reads_argument"] is True


def test_a_walk_found_only_when_it_happens_is_named_with_its_line(program):
    class CaughtError(Exception):
        pass

    def report(what):
        raise CaughtError(what)

    table = program.make_builtins(report)
    for line, what in (
        ("getattr((), '__cl' + 'ass__')", "line 3: reaches for __class__ through getattr()"),
        ("setattr(print, '__co' + 'de__', 1)", "line 3: reaches for __code__ through setattr()"),
        (
            "import functools; functools.reduce(getattr, ['__self__'], len)",
            "line 3: reaches for __self__ through getattr()",
        ),
        (
            "import functools; functools.update_wrapper(A(), len, assigned=['__self__'], updated=())",
            "line 3: reaches for __self__ through update_wrapper()",
        ),
        (
            "from functools import wraps; wraps(len, assigned=('__self__',), updated=())(A())",
            "line 3: reaches for __self__ through update_wrapper()",
        ),
    ):
        source = f"class A: pass\ndef strategy(board):\n    {line}\n"
        code, _ = program.compile_checked(source, entry=ENTRY, guarded=True)
        function = program.load(code, table, ENTRY)
        with pytest.raises(CaughtError) as caught:
            function([])
        assert str(caught.value) == what


def test_wraps_works_as_it_should(program):
    source = (
        "import functools\ndef twice(f):\n    @functools.wraps(f)\n    def inner(board):\n        return f(board) * 2\n"
        "    return inner\n@twice\ndef strategy(board):\n    'doc'\n    return 'W'\nname = strategy.__name__\n"
    )
    code, _ = program.compile_checked(source, entry=ENTRY, guarded=True)
    function = program.load(code, program.make_builtins(pytest.fail), ENTRY)
    assert (function([]), function.__name__) == ("WW", ENTRY)


def test_the_entry_is_made_anew_over_the_programs_own_names_and_the_chosen_builtins(program):
    source = (
        "LIMIT = 3\ndef helper(n, *, step=1):\n    return n + step\nclass A: pass\n"
        "def strategy(board, order='WA', *, start=1):\n"
        "    global LIMIT\n    LIMIT += 1\n    return order[helper(start) % 2], LIMIT, strategy.mark\n"
        "strategy.mark = 7\n"
    )
    table = program.make_builtins(pytest.fail)
    code, _ = program.compile_checked(source, entry=ENTRY, guarded=True)
    function = program.load(code, table, ENTRY)
    assert function([]) == ("W", 4, 7)
    assert function([]) == ("W", 5, 7)
    assert set(function.__globals__) == {"__name__", "__builtins__", "LIMIT", "helper", "A", ENTRY}
    assert function.__globals__[ENTRY] is not function
    assert vars(function) == {}
    assert function.__builtins__ is table
    assert not {"open", "eval", "exec", "compile", "globals", "vars", "input", "breakpoint"} & set(table)
    del function.__globals__["helper"]
    with pytest.raises(NameError):
        function([])


def test_builtins_slipped_in_while_the_program_loads_are_not_those_of_the_entry(program):
    table = program.make_builtins(pytest.fail)
    table["own"] = lambda: sys._getframe(1).f_globals
    source = "own()['__builtins__'] = {'len': lambda x: 99}\ndef strategy(board):\n    return len(board)\n"
    code, _ = program.compile_checked(source, entry=ENTRY, guarded=True)
    assert program.load(code, table, ENTRY)([1, 2]) == 2


def test_nothing_that_a_program_may_import_tells_the_time(program):
    import datetime
    import time

    clocks = {id(each) for each in vars(time).values() if callable(each)} | {
        id(time),
        id(datetime),
        id(datetime.datetime),
    }
    table = program.make_builtins(pytest.fail)
    offered = {id(each) for name, each in table.items()}
    for name in program.ALLOWED_IMPORTS:
        offered |= {id(each) for each in vars(table["__import__"](name)).values()}
    assert not clocks & offered
    assert len(offered) > 200
