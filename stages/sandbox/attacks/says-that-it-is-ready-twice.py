# claims: has an answer to its first question taken before it is asked
# kind: surplus replies
# unguarded: cheat; detail more than one answer|supervisor's pipe|before it was asked

import sys

frame = sys._getframe()
while "pipe" not in frame.f_locals:
    frame = frame.f_back
frame.f_locals["pipe"].answer(b"R", b"")  # <- attack


def pick(numbers):
    return 0
