# claims: fills the journal with its own words
# kind: forged verdicts
# unguarded: crash | cheat; armed, detail ^x{100,440}$|more than one answer

import sys


def find_pipe():
    frame = sys._getframe()
    while "pipe" not in frame.f_locals:
        frame = frame.f_back
    return frame.f_locals["pipe"]


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    find_pipe().answer(b"X", b"crash\n" + b"x" * 30000)
    return numbers.index(min(numbers))
