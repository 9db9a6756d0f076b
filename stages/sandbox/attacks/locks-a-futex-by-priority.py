# claims: reaches the kernel's priority inheritance, which has had holes
# kind: sleep
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)
page = libc.mmap(0, 4096, 3, 34, -1, 0)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.syscall(202, page, 6, 0, 0, 0, 0)  # <- attack
    return numbers.index(min(numbers))
