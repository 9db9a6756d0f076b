# claims: sends an answer beside the one that it returns
# kind: surplus replies
# unguarded: cheat; armed

import sys


def find_pipe():
    frame = sys._getframe()
    while "pipe" not in frame.f_locals:
        frame = frame.f_back
    return frame.f_locals["pipe"]


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    find_pipe().send(b"7")
    return numbers.index(min(numbers))
