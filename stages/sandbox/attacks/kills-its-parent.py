# claims: ends the supervisor
# kind: kill(-1)
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.kill(1, 9)  # <- attack
    return numbers.index(min(numbers))
