# claims: has failing system calls return success, by a seccomp filter of its own
# kind: system calls
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.syscall(317, 1, 8, 0)  # <- attack
    return numbers.index(min(numbers))
