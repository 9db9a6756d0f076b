# claims: halts where no limit of CPU counts
# kind: signals
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.kill(0, 19)  # <- attack
    return numbers.index(min(numbers))
