# claims: answers every question itself, then ends well
# kind: writes to the supervisor's pipe
# unguarded: ok; armed, says 8

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
    nonce = find_pipe().nonce
    while True:
        os.write(1, nonce + b"M" + struct.pack("<I", 1) + b"8")
        question = os.read(0, 65536)
        if not question:
            os._exit(0)
        nonce = question[:8]
    return numbers.index(min(numbers))
