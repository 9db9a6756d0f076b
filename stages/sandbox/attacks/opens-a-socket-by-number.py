# claims: opens a connection with the system call itself
# kind: network
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.syscall(41, 2, 1, 0)  # <- attack
    return numbers.index(min(numbers))
