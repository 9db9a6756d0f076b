"""Both ends of the pipe: `judge` holds the boards, in the supervisor; `serve` calls the program, in its own process.

question: size (1 byte), then the coins of each cell, the walker's cell first;   answer: one of W A S D
"""

import itertools
import random

STEPS = {b"W": (-1, 0), b"A": (0, -1), b"S": (1, 0), b"D": (0, 1)}


def judge(cases, ask):
    """Yields a row for each case; a program's own failure ends it there, and the supervisor says why."""
    for case in cases:
        size, draw = case["size"], random.Random(case["seed"])
        board = [[draw.choice((0, 1, 2, 5)) for _ in range(size)] for _ in range(size)]
        most = sum(sorted(itertools.chain(*board))[-case["steps"] :])
        row = column = coins = 0
        moves = b""
        while len(moves) < case["steps"]:
            rows = [board[(row + down) % size] for down in range(size)]
            move = ask(bytes([size]) + b"".join(bytes(each[column:] + each[:column]) for each in rows))
            if move not in STEPS:
                break
            row, column = (row + STEPS[move][0]) % size, (column + STEPS[move][1]) % size
            coins += board[row][column]
            board[row][column] = 0
            moves += move
        yield {"seed": case["seed"], "coins": coins, "most": max(most, 1), "moves": moves.decode()}


def serve(function, receive, send):
    """Answers questions with what the program returns; its random numbers are the same whenever it is judged."""
    random.seed(0)
    while question := receive():
        size = question[0]
        move = function([list(question[start : start + size]) for start in range(1, len(question), size)])
        send(move.encode() if type(move) is str and len(move) == 1 else b"?")
