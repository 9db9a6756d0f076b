# claims: uses CPU that is not counted as the program's, by giving pages back and touching them again
# kind: CPU loop
# unguarded: timeout; armed, cpu 0.4

import ctypes

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_size_t
libc.madvise.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
page = libc.mmap(0, 1 << 24, 3, 34, -1, 0)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    while True:
        ctypes.memset(page, 1, 1 << 24)
        libc.madvise(page, 1 << 24, 4)
    return numbers.index(min(numbers))
