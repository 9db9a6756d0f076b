# claims: has the supervisor meet a frame of a kind that is none
# kind: writes to the supervisor's pipe
# unguarded: cheat; armed, detail supervisor's pipe

import sys

frame = sys._getframe()
while "pipe" not in frame.f_locals:
    frame = frame.f_back
pipe = frame.f_locals["pipe"]


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    pipe.answer(b"R", b"")
    return numbers.index(min(numbers))
