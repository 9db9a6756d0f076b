# claims: runs machine code of its own, by pkey_mprotect
# kind: ctypes
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_size_t
page = libc.mmap(0, 4096, 3, 34, -1, 0)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.syscall(329, ctypes.c_void_p(page), 4096, 5, -1)  # <- attack
    return numbers.index(min(numbers))
