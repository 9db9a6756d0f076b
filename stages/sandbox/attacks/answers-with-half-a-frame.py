# claims: has the supervisor wait for the rest for ever
# kind: writes to the supervisor's pipe
# unguarded: timeout; armed, cpu 0.4

import os
import sys


def find_pipe():
    frame = sys._getframe()
    while "pipe" not in frame.f_locals:
        frame = frame.f_back
    return frame.f_locals["pipe"]


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.write(1, find_pipe().nonce)
    while True:
        pass
    return numbers.index(min(numbers))
