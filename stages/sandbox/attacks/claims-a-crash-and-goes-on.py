# claims: has its case closed while it lives on
# kind: forged verdicts
# unguarded: crash | cheat; armed

import sys


def find_pipe():
    frame = sys._getframe()
    while "pipe" not in frame.f_locals:
        frame = frame.f_back
    return frame.f_locals["pipe"]


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    find_pipe().answer(b"X", b"crash\nor not")
    while True:
        pass
    return numbers.index(min(numbers))
