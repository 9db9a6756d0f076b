# claims: ends the supervisor through a descriptor of its process
# kind: kill(-1)
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.syscall(434, 1, 0)  # <- attack
    return numbers.index(min(numbers))
