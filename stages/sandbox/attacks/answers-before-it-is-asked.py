# claims: has an answer ready for each nonce that there could be
# kind: surplus replies
# unguarded: cheat; detail supervisor's pipe

import os
import struct

os.write(1, (bytes(8) + b"M" + struct.pack("<I", 1) + b"7") * 8)  # <- attack


def pick(numbers):
    return 0
