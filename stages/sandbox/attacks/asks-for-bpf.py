# claims: loads a program into the kernel
# kind: system calls
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.syscall(321, 0, 0, 0)  # <- attack
    return numbers.index(min(numbers))
