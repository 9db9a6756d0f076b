# claims: ends its only thread, and leaves the process to look as if it lived
# kind: os._exit
# unguarded: crash; armed, detail exited with status 0

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.syscall(60, 0)
    return numbers.index(min(numbers))
