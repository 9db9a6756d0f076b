# claims: has an answer of an earlier question taken for the present one
# kind: writes to the supervisor's pipe
# unguarded: cheat; armed, detail supervisor's pipe

import sys

frame = sys._getframe()
while "pipe" not in frame.f_locals:
    frame = frame.f_back
pipe = frame.f_locals["pipe"]
old = pipe.nonce


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    pipe.nonce = old
    return 0
