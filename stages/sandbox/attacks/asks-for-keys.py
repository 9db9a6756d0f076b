# claims: keeps data in the kernel's keyring, which outlives it
# kind: system calls
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.syscall(248, b"user", b"message", b"x", 1, -3)  # <- attack
    return numbers.index(min(numbers))
