#% works-hard-at-each-move
def strategy(board):
    total = 0
    for i in range(4000):
        total = (total * 31 + board[i % 4][i // 4 % 4]) % 1000003
    return "WASD"[total % 4]
#% prepares-a-table-first
TABLE = {}
for n in range(60000):
    TABLE[n] = n * n % 7

def strategy(board):
    return "WASD"[TABLE[sum(map(sum, board)) % 60000] % 4]
#% keeps-a-million-numbers
numbers = list(range(10 ** 6))

def strategy(board):
    return "WASD"[numbers[sum(map(sum, board))] // 2 % 4]
#% sieve
def primes(n):
    marked = [True] * n
    for i in range(2, n):
        if marked[i]:
            for j in range(i * i, n, i):
                marked[j] = False
    return [i for i in range(2, n) if marked[i]]

PRIMES = primes(5000)

def strategy(board):
    return "WASD"[PRIMES[sum(map(sum, board)) % len(PRIMES)] % 4]
#% prints-much
def strategy(board):
    for _ in range(200):
        print(board, "x" * 100)
    return "A" if board[0][0] else "W"
#% large-integers
def strategy(board):
    n = 3 ** (200 + board[0][0])
    return "WASD"[n // 10 ** 20 % 4]
#% big-strings
def strategy(board):
    text = "abc" * 50000
    return "WASD"[(text.count("b") + board[0][0]) % 4]
#% sorts-ten-thousand
import random

values = [random.Random(5).random() for _ in range(100)] * 100

def strategy(board):
    return "WASD"[sorted(range(500), key=values.__getitem__)[board[0][0] % 500] % 4]
#% recursion-limit-caught
def forever(n):
    return forever(n + 1)

def strategy(board):
    try:
        forever(0)
    except RecursionError:
        return "A" if board[0][0] else "W"
#% many-small-objects
def strategy(board):
    nodes = [{"value": n, "next": [n + 1]} for n in range(3000)]
    return "WASD"[sum(node["next"][0] for node in nodes) % 3 + (board[0][0] > 0)]
#% simulated-annealing
import math, random

def strategy(board):
    state, energy = 0, 10.0
    for step in range(1, 60):
        other = (state + random.choice((-1, 1))) % 4
        cost = board[other][other] / step
        if cost < energy or random.random() < math.exp((energy - cost) / step):
            state, energy = other, cost
    return "WASD"[state]
#% state-machine
STATES = {
    "start": lambda b: ("A", "middle" if b[0][0] else "start"),
    "middle": lambda b: ("W", "end" if b[1][1] else "start"),
    "end": lambda b: ("D", "start"),
}

class Machine:
    def __init__(self):
        self.state = "start"

    def __call__(self, board):
        letter, self.state = STATES[self.state](board)
        return letter

strategy = Machine()
#% history-of-letters
history = []

def strategy(board):
    letter = "W" if history[-2:] == ["A", "A"] else "S" if len(history) % 9 == 8 else "A"
    history.append(letter)
    return letter
#% detects-a-wasted-move
last = None

def strategy(board):
    global last
    key = str(board)
    letter = "D" if key == last else "A"
    last = key
    return letter if letter == "A" or board[0][0] else "W"
#% deque-of-boards
from collections import deque

recent = deque(maxlen=3)

def strategy(board):
    recent.append(sum(map(sum, board)))
    return "WASD"[sum(recent) // 2 % 4]
#% changes-its-own-copy-of-the-board
def strategy(board):
    board[0][0] += 2
    board.reverse()
    board[0].sort()
    return "A" if board[0][-1] > 4 else "W"
#% clears-the-board-it-was-given
def strategy(board):
    total = sum(map(sum, board))
    board.clear()
    return "WASD"[total // 2 % 4]
#% keeps-the-board-it-was-given
boards = []

def strategy(board):
    boards.append(board)
    return "WASD"[(len(boards) + boards[0][0][0]) % 4]
#% always-illegal-in-the-end
def strategy(board):
    return "A" if sum(map(sum, board)) < 12 else "left"
#% returns-none-in-the-end
def strategy(board):
    if sum(map(sum, board)) < 20:
        return "WASD"[board[0].count(0) % 4]
#% lower-case-letters
def strategy(board):
    return "A" if sum(map(sum, board)) < 8 else "a"
#% letter-with-a-space
def strategy(board):
    return "S" if sum(map(sum, board)) < 8 else "S "
