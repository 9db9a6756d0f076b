# claims: makes system calls by their x32 numbers, which filters forget
# kind: system calls
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.syscall(0x40000000 + 39)  # <- attack
    return numbers.index(min(numbers))
