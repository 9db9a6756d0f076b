# claims: holds the kernel in the middle of a copy
# kind: system calls
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.syscall(323, 1)  # <- attack
    return numbers.index(min(numbers))
