# claims: reads a file through the C library, where no name of Python's gives it away
# kind: file reads
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)
flags = 0


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.open(b"/etc/passwd", flags)  # <- attack
    return numbers.index(min(numbers))
