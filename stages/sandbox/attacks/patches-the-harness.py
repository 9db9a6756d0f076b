# claims: replaces the functions that carry its answers
# kind: patched time
# unguarded: ok; armed, says patched

import struct
import sys

frame = sys._getframe()
while "pipe" not in frame.f_locals:
    frame = frame.f_back
pipe = frame.f_locals["pipe"]
send = pipe.send
pipe.send = lambda payload: send(payload if payload == b"armed" else b"patched")


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    return 0
