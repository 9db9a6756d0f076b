# claims: has the kernel make its system calls for it, past every filter
# kind: system calls
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.syscall(425, 8, 0)  # <- attack
    return numbers.index(min(numbers))
