# claims: is root in a user namespace of its own
# kind: system calls
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.unshare(0x10000000)  # <- attack
    return numbers.index(min(numbers))
