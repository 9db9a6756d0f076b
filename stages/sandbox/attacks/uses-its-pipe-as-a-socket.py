# claims: sends the supervisor a descriptor along with its answer
# kind: network
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.sendmsg(1, None, 0)  # <- attack
    return numbers.index(min(numbers))
