# claims: ends the supervisor by tgkill, which a filter of kill does not meet
# kind: kill(-1)
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.syscall(234, 1, 1, 9)  # <- attack
    return numbers.index(min(numbers))
