# claims: watches other processes through the processor's counters
# kind: system calls
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.syscall(298, 0, 0, -1, -1, 0)  # <- attack
    return numbers.index(min(numbers))
