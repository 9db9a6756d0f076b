#% dataclass-like
class State:
    __slots__ = ("board", "score")

    def __init__(self, board, score=0):
        self.board = [row[:] for row in board]
        self.score = score

    def __repr__(self):
        return f"State({self.board!r}, score={self.score})"

def strategy(board):
    state = State(board, score=board[0][0])
    return "WA"[len(repr(state)) % 2]
#% operators
class Vector:
    def __init__(self, *values):
        self.values = values

    def __add__(self, other):
        return Vector(*(a + b for a, b in zip(self.values, other.values)))

    def __mul__(self, number):
        return Vector(*(a * number for a in self.values))

    __rmul__ = lambda self, number: self * number

    def __getitem__(self, index):
        return self.values[index]

def strategy(board):
    total = 2 * Vector(*board[0]) + Vector(*board[1])
    return "WASD"[total[1] // 2 % 4]
#% context-manager
class Counting:
    def __enter__(self):
        self.count = 0
        return self

    def __exit__(self, kind, error, trace):
        return kind is ValueError

def strategy(board):
    with Counting() as counting:
        for row in board:
            counting.count += row.count(0)
        raise ValueError("enough")
    return "WASD"[counting.count % 4]
#% property
class View:
    def __init__(self, board):
        self._board = board

    @property
    def top(self):
        return self._board[0]

    @top.setter
    def top(self, row):
        self._board[0] = row

def strategy(board):
    view = View([row[:] for row in board])
    view.top = view.top[::-1]
    return "A" if view.top[0] else "W"
#% inheritance
class Player:
    def move(self, board):
        return self.choose(board)

    def choose(self, board):
        raise NotImplementedError

class Left(Player):
    def choose(self, board):
        return "A" if board[0][0] else "W"

class Both(Left):
    def choose(self, board):
        return super().choose(board) if board[1][1] else "S"

def strategy(board):
    return Both().move(board)
#% multiple-inheritance
class A:
    def letter(self):
        return "A"

class B(A):
    def letter(self):
        return "W" + super().letter()

class C(A):
    def letter(self):
        return "S" + super().letter()

class D(B, C):
    pass

def strategy(board):
    return D().letter()[sum(board[0]) // 2 % 3]
#% iterator-class
class Cells:
    def __init__(self, board):
        self.board, self.index = board, -1

    def __iter__(self):
        return self

    def __next__(self):
        self.index += 1
        if self.index == 16:
            raise StopIteration
        return self.board[self.index // 4][self.index % 4]

def strategy(board):
    return "WASD"[sum(place for place, cell in enumerate(Cells(board)) if cell) % 4]
#% container-class
class Grid:
    def __init__(self, board):
        self.cells = sum(board, [])

    def __len__(self):
        return sum(map(bool, self.cells))

    def __contains__(self, value):
        return value in self.cells

    def __getitem__(self, place):
        r, c = place
        return self.cells[4 * r + c]

    def __bool__(self):
        return len(self) > 8

def strategy(board):
    grid = Grid(board)
    if grid:
        return "A" if 4 in grid else "W"
    return "S" if grid[0, 0] else "D"
#% name-of-the-type
class Move:
    pass

class Up(Move):
    pass

def strategy(board):
    return {"Up": "W", "Move": "A"}[type(Up() if board[0][0] else Move()).__name__]
#% class-attributes-as-an-enumeration
class Direction:
    UP, LEFT, DOWN, RIGHT = "WASD"
    ALL = (UP, LEFT, DOWN, RIGHT)

def strategy(board):
    return Direction.ALL[board[3].count(0) % 4] if any(board[3]) else Direction.LEFT
#% named-tuple
from collections import namedtuple

Move = namedtuple("Move", ["letter", "gain"])

def strategy(board):
    moves = [Move("A", sum(board[0])), Move("W", sum(row[0] for row in board))]
    return max(moves, key=lambda move: move.gain)._replace(gain=0).letter
#% typed-named-tuple
from typing import NamedTuple

class Move(NamedTuple):
    letter: str
    gain: int = 0

    def better(self, other: "Move") -> bool:
        return self.gain > other.gain

def strategy(board):
    a, b = Move("S", sum(board[3])), Move("D", sum(row[3] for row in board))
    return a.letter if a.better(b) else b.letter
#% typed-dict
from typing import TypedDict

class Best(TypedDict):
    letter: str
    worth: int

def strategy(board):
    best: Best = {"letter": "A", "worth": -1}
    for letter, row in zip("WASD", board):
        if sum(row) > best["worth"]:
            best = Best(letter=letter, worth=sum(row))
    return best["letter"]
#% protocol-and-generic
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")

class Plays(Protocol):
    def move(self, board: list) -> str: ...

class Box(Generic[T]):
    def __init__(self, thing: T) -> None:
        self.thing = thing

def strategy(board):
    box: Box[str] = Box("W" if board[0][0] else "A")
    return box.thing
#% metaclass-of-its-own
class Registering(type):
    kinds = []

    def __new__(meta, name, bases, names):
        kind = super().__new__(meta, name, bases, names)
        meta.kinds.append(kind)
        return kind

class Rule(metaclass=Registering):
    letter = "A"

class Second(Rule):
    letter = "W"

def strategy(board):
    return Registering.kinds[board[0][0] > 0].letter
#% subclass-hook
class Rule:
    rules = []

    def __init_subclass__(cls, weight=1, **options):
        super().__init_subclass__(**options)
        Rule.rules.append((weight, cls))

class Left(Rule, weight=2):
    letter = "A"

class Up(Rule):
    letter = "W"

def strategy(board):
    weight, rule = Rule.rules[sum(board[0]) // 2 % 2]
    return rule.letter
#% private-attributes
class Player:
    def __init__(self):
        self.__order = "DSWA"

    def move(self, board):
        return self.__order[board[1].count(0) % 4]

player = Player()

def strategy(board):
    return player.move(board)
#% class-in-a-function
def strategy(board):
    class Local:
        size = len(board)

        def corner(self):
            return board[Local.size - 1][Local.size - 1]
    return "W" if Local().corner() else "D"
#% class-made-by-type
Player = type("Player", (), {"move": lambda self, board: "A" if board[0][1] else "S"})

def strategy(board):
    return Player().move(board)
#% list-subclass
class Board(list):
    def empty(self):
        return sum(row.count(0) for row in self)

def strategy(board):
    return "WASD"[Board(board).empty() % 4]
#% dict-with-missing
class Worth(dict):
    def __missing__(self, key):
        self[key] = value = key.bit_length()
        return value

worth = Worth()

def strategy(board):
    return "WASD"[sum(worth[cell] for cell in board[0] + board[1]) % 4]
#% hash-and-equality
class Position:
    def __init__(self, board):
        self.key = tuple(map(tuple, board))

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return self.key == other.key

def strategy(board):
    seen = {Position(board): "A"}
    return seen[Position([row[:] for row in board])] if board[0][0] else "W"
#% format-method
class Tile:
    def __init__(self, value):
        self.value = value

    def __format__(self, width):
        return str(self.value).rjust(int(width or 0))

def strategy(board):
    text = " ".join(f"{Tile(cell):5}" for cell in board[0])
    return "WASD"[text.count(" ") % 4]
#% deepcopy-hook
import copy

class Node:
    def __init__(self, board):
        self.board = board

    def __deepcopy__(self, memo):
        return Node([row[:] for row in self.board])

def strategy(board):
    node = copy.deepcopy(Node(board))
    node.board[0][0] = 0
    return "A" if board[0][0] != node.board[0][0] else "W"
#% getattr-with-a-default
class Settings:
    first = "A"

def strategy(board):
    name = "first" if board[0][0] else "second"
    letter = getattr(Settings, name, "W")
    if not hasattr(Settings, "third"):
        setattr(Settings, "third", "S")
    return letter
#% linked-list
class Node:
    def __init__(self, value, rest=None):
        self.value, self.rest = value, rest

def strategy(board):
    head = None
    for cell in sum(board, []):
        head = Node(cell, head)
    count = 0
    while head:
        count, head = count + (head.value > 2), head.rest
    return "AWSD"[count % 4]
#% cyclic-objects
class Node:
    pass

a, b = Node(), Node()
a.other, b.other = b, a

def strategy(board):
    node = a
    for _ in range(board[0][0]):
        node = node.other
    return "W" if node is a else "A"
#% finaliser-that-does-nothing
class Temporary:
    def __del__(self):
        pass

def strategy(board):
    Temporary()
    return "A" if board[2][0] else "W"
#% subclass-of-exception
class NoMove(Exception):
    def __init__(self, letter):
        super().__init__(f"no move {letter}")
        self.letter = letter

def strategy(board):
    try:
        raise NoMove("WASD"[board[0].count(0) % 4])
    except NoMove as problem:
        return problem.letter
#% unhashable-and-identity
def strategy(board):
    same = board[0] is board[0]
    other = board[0] is not board[1]
    return "A" if same and other and board[0][0] else "W"
#% one-method-under-two-names
class Amount:
    __hash__ = None

    def __init__(self, number):
        self.number = number

    def __add__(self, other):
        return Amount(self.number + (other.number if isinstance(other, Amount) else other))

    __radd__ = __iadd__ = __add__

def strategy(board):
    return "WASD"[sum(map(Amount, board[0])).number // 2 % 4]
#% immutable-by-setattr
class Fixed:
    __slots__ = ("letter",)

    def __init__(self, letter):
        object.__setattr__(self, "letter", letter)

    def __setattr__(self, name, value):
        raise AttributeError(name)

def strategy(board):
    fixed = Fixed("A" if board[0][0] else "W")
    try:
        fixed.letter = "X"
    except AttributeError:
        return fixed.letter
