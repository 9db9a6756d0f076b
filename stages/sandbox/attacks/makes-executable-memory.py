# claims: runs machine code of its own
# kind: ctypes
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.mmap(0, 4096, 7, 34, -1, 0)  # <- attack
    return numbers.index(min(numbers))
