# claims: costs the supervisor more than itself by answering a byte at a time
# kind: output flood
# unguarded: output_limit | timeout; armed

import os
import sys


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    frame = sys._getframe()
    while "pipe" not in frame.f_locals:
        frame = frame.f_back
    os.write(1, frame.f_locals["pipe"].nonce + b"M" + (1 << 20).to_bytes(4, "little"))
    for _ in range(1 << 20):
        os.write(1, b"x")
    while True:
        pass
    return numbers.index(min(numbers))
