# claims: makes code writable and changes it
# kind: ctypes
# unguarded: crash; armed, detail SIGSEGV

import ctypes

libc = ctypes.CDLL(None)
page = ctypes.cast(libc.getpid, ctypes.c_void_p).value & ~4095


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.mprotect(ctypes.c_void_p(page), 4096, 3)
    ctypes.memset(page, 0xC3, 4096)
    libc.getpid()
    return numbers.index(min(numbers))
