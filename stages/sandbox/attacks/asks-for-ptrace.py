# claims: controls another process
# kind: system calls
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.ptrace(16, 1, 0, 0)  # <- attack
    return numbers.index(min(numbers))
