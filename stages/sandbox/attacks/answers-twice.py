# claims: has its second answer taken for the next question's
# kind: surplus replies
# unguarded: cheat; armed

import os
import struct
import sys


def find_pipe():
    frame = sys._getframe()
    while "pipe" not in frame.f_locals:
        frame = frame.f_back
    return frame.f_locals["pipe"]


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.write(1, find_pipe().nonce + b"M" + struct.pack("<I", 1) + b"7")
    return numbers.index(min(numbers))
