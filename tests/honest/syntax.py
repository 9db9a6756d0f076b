#% walrus
def strategy(board):
    if (empty := sum(row.count(0) for row in board)) > 10:
        return "A"
    return "WASD"[n % 4] if (n := empty + board[0][0]) else "S"
#% match-statement
def strategy(board):
    match board:
        case [[0, 0, *_], *_]:
            return "A"
        case [[first, second, *_], *rest] if first == second:
            return "A"
        case [[int() as first, *_], [below, *_], *_] if first == below:
            return "W"
        case _:
            return "S" if board[3][0] == 0 else "D"
#% match-classes-and-mappings
class Point:
    def __init__(self, x, y):
        self.x, self.y = x, y

def kind(thing):
    match thing:
        case {"a": int(n), **rest}:
            return n
        case Point(x=0, y=y):
            return y
        case str() | bytes():
            return 1
        case None | True:
            return 2
        case (1, 2, *others):
            return len(others)
        case -1 | 0.5:
            return 3
        case _:
            return 0

def strategy(board):
    things = [{"a": 3}, Point(0, 2), "x", None, (1, 2, 3), -1, object()]
    return "WASD"[kind(things[sum(board[0]) // 2 % 7]) % 4]
#% f-strings
def strategy(board):
    text = f"{board[0][0]:>6}|{board[0]!r:^30}|{sum(board[1])=}|{'nested ' + f'{1 + 1}'}|{{}}"
    return "WASD"[len(text) % 4]
#% old-formatting
def strategy(board):
    text = "%5d %s %r" % (board[0][0], board[1], "x") + "{0:>{1}}".format("a", board[0][0] + 1)
    return "WASD"[len(text) % 4]
#% unpacking
def strategy(board):
    (a, *b), *c, (*d, e) = board
    merged = [*b, *d, *c[0]]
    table = {**{"a": a}, **{"e": e}}
    return "WASD"[(sum(merged) + table["a"] + table["e"]) // 2 % 4]
#% augmented-everything
def strategy(board):
    x = 7
    x += board[0][0]; x -= 1; x *= 3; x //= 2; x %= 101; x **= 2; x <<= 1; x >>= 2; x |= 8; x &= 255; x ^= 5
    return "WASD"[x % 4]
#% try-except-else-finally
def strategy(board):
    letter = "W"
    try:
        1 // board[0][0]
    except ZeroDivisionError:
        letter = "A"
    except (TypeError, ValueError) as problem:
        letter = str(problem)
    else:
        letter = "D" if board[3][3] else "W"
    finally:
        done = True
    return letter if done else "X"
#% exception-groups
def strategy(board):
    try:
        raise ExceptionGroup("both", [ValueError(1), KeyError(2)])
    except* ValueError:
        letter = "A"
    except* KeyError:
        letter = "W" if board[0][0] else "S"
    return letter
#% raise-from
def strategy(board):
    try:
        try:
            board[9]
        except IndexError as error:
            raise KeyError("no such row") from error
    except KeyError:
        return "A" if board[0][0] else "W"
#% bare-except
def strategy(board):
    try:
        return "WASD"[board[0][0]]
    except:
        return "A"
#% assert-statements
def strategy(board):
    assert len(board) == 4, "four rows"
    assert all(len(row) == 4 for row in board)
    return "W" if board[0][0] else "A"
#% global-statement
turn = 0

def strategy(board):
    global turn
    turn += 1
    return "AW"[turn % 2] if turn % 7 else "D"
#% delete-statement
def strategy(board):
    rows = [row[:] for row in board]
    del rows[0], rows[-1][0]
    return "WASD"[sum(map(len, rows)) % 4 - (board[0][0] > 0)]
#% ellipsis-and-notimplemented
class A:
    def __eq__(self, other):
        return NotImplemented

def strategy(board):
    x = ...
    return "W" if (A() == 3) or x is not Ellipsis else "A"
#% async-that-is-never-awaited
async def think(board):
    return "A"

def strategy(board):
    step = think(board)
    try:
        step.send(None)
    except StopIteration as done:
        return done.value
#% conditional-imports-under-main
import math

def strategy(board):
    return "S" if board[2][2] else "A"

if __name__ == "__main__":
    print(strategy([[0] * 4] * 4), math.pi)
#% module-level-prints
print("starting up", end="", flush=True)

def strategy(board):
    print("board:", *board, sep="\n")
    return "A" if board[0][0] else "D"
#% docstrings-everywhere
"""A module docstring.

With several lines.
"""

class Thing:
    """A class docstring."""

def strategy(board):
    '''Chooses.

    >>> strategy([[2, 2, 0, 0]] * 4)
    'A'
    '''
    "another string that does nothing"
    return "A" if board[1][0] else "W"
#% scary-words-in-strings
NOTES = "never call os.system('rm -rf /') or __import__('os') or eval(open('/etc/passwd').read())"

def strategy(board):
    # import os; os.system("id"); __builtins__; ().__class__.__subclasses__(); exec("x")
    words = ["import socket", "subprocess.Popen", "__globals__", "sys.exit", "gi_frame", "ctypes"]
    return "WASD"[(len(NOTES) + len(words) + board[0][0]) % 4]
#% scary-words-as-names
def strategy(board):
    system, socket, thread, process, fork, kill, signal, ctypes_ = range(8)
    import_count = evaluate = execute = opened = system + board[0][0]
    return "WASD"[(import_count + evaluate + execute + opened) % 4]
#% its-own-open-and-compile
def open(row):
    return [cell for cell in row if not cell]

def compile(board):
    return sum(len(open(row)) for row in board)

def strategy(board):
    return "WASD"[compile(board) % 4]
#% its-own-vars-and-eval-as-parameters
def score(eval, exec=1):
    return eval + exec

def strategy(board):
    vars = [score(row[0]) for row in board]
    return "WASD"[sum(vars) % 4]
#% shadowed-builtins
def strategy(board):
    list = [cell for row in board for cell in row]
    max = 0
    for int in list:
        if int > max:
            max = int
    sum, len, str, id, type, input = max, 3, "WASD", 1, 2, 3
    return str[(sum + len + id + type + input) // 2 % 4]
#% keyword-like-names
def strategy(board):
    match = board[0]
    case = board[1]
    type = match[0] + case[0]
    _ = type
    return "WASD"[_ // 2 % 4]
#% unicode-identifiers
def größe(brett):
    return sum(zahl for zeile in brett for zahl in zeile)

def strategy(board):
    π, 変数, naïve = 3, größe(board), 1
    return "WASD"[(π + 変数 + naïve) // 2 % 4]
#% unicode-text
ARROWS = {"↑": "W", "←": "A", "↓": "S", "→": "D", "🙂": "A"}

def strategy(board):
    return ARROWS["↑←↓→🙂"[sum(board[0]) // 2 % 5]]
#% escapes-in-strings
def strategy(board):
    text = "\x41\u0057\N{LATIN CAPITAL LETTER S}" + r"\n\x00" + "\0\t" + b"\xff".hex() + "\\"
    return text[board[0][0] % 3]
#% very-long-line
def strategy(board): return "WASD"[(board[0][0] * 1 + board[0][1] * 2 + board[0][2] * 3 + board[0][3] * 4 + board[1][0] * 5 + board[1][1] * 6 + board[1][2] * 7 + board[1][3] * 8 + board[2][0] * 9 + board[2][1] * 10 + board[2][2] * 11 + board[2][3] * 12 + board[3][0] * 13 + board[3][1] * 14 + board[3][2] * 15 + board[3][3] * 16) // 2 % 4]
#% backslash-continuation
def strategy(board):
    total = board[0][0] + \
        board[1][1] + \
        board[2][2]
    return "W" \
        if total > 4 \
        else "A"
#% odd-indentation
def strategy(board):
 if board[0][0]:
        for row in board:
          if row[0] == 0:
                 return "W"
        return "A"
 return "S"
#% tabs indent=tab
def strategy(board):
	for row in board:
		if row[0] == row[1]:
			return "A"
	return "W"
#% crlf-line-ends newline=crlf
def strategy(board):
    """Written
    on Windows."""
    text = '''a
b'''
    return "WASD"[(len(text) + board[0][0]) % 4]
#% no-newline-at-the-end newline=none
def strategy(board):
    return "A" if board[0][0] else "W"
#% blank-lines-and-comments



# a comment


def strategy(board):


    # another

    return "D" if board[0][3] == 0 else "W"


# the end


#% everything-in-a-tuple
strategy = (lambda f: f)(lambda board: ("A", "W")[board[0][0] > board[0][1]])
#% parentheses-around-everything
def strategy(board):
    return ((("A"))) if (((board)[0])[0]) else (("W"))
#% string-concatenation-by-adjacency
def strategy(board):
    return ("W" "A"
            "S" "D")[sum(board[3]) // 2 % 4]
#% lambda-with-defaults-and-stars
f = lambda a, /, b=2, *c, d=3, **e: a + b + sum(c) + d + len(e)

def strategy(board):
    return "WASD"[f(board[0][0], 1, 2, d=4, x=5) % 4]
#% comprehension-scopes
def strategy(board):
    x = 5
    squares = [x * x for x in range(4)]
    grid = [[r * c for c in squares] for r in squares if r]
    return "WASD"[(x + sum(map(sum, grid)) + board[0][0]) % 4]
#% dict-merge-and-union
def strategy(board):
    table = {"a": 1} | {"b": 2}
    table |= {"c": board[0][0]}
    return "WASD"[sum(table.values()) % 4]
#% star-in-index-and-return
def strategy(board):
    def pair():
        first, *rest = board[0]
        return first, *rest
    return "WASD"[sum(pair()) // 2 % 4]
#% parenthesised-with
class Nothing:
    def __enter__(self):
        return 1

    def __exit__(self, *error):
        return None

def strategy(board):
    with (Nothing() as a, Nothing() as b):
        return "WASD"[(a + b + board[0][0]) % 4]
#% numbers-with-methods
def strategy(board):
    return "WASD"[(5).bit_length() + (-3).__abs__() - 4 - (board[0][0] > 0)]
#% annotated-assignments-without-values
def strategy(board):
    letter: str
    count: int = 0
    if board[0][0]:
        letter = "A"
    else:
        letter = "W"
    return letter
#% type-comments-and-noqa
import math  # noqa: F401

def strategy(board):  # type: (list) -> str
    return "A" if board[0][0] else "W"  # pylint: disable=all
#% module-metadata
__author__ = "somebody"
__version__ = "1.0"
__all__ = ["strategy"]

def strategy(board):
    return "A" if board[3][3] else "S"
#% return-in-finally-less-generator
def tries():
    try:
        yield 1
        yield 2
    finally:
        pass

def strategy(board):
    for n in tries():
        if n == 1 + (board[0][0] > 0):
            break
    return "WA"[n - 1]
