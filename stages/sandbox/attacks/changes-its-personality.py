# claims: has all readable memory become executable
# kind: system calls
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.personality(0x0400000)  # <- attack
    return numbers.index(min(numbers))
