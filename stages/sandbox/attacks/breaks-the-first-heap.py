# claims: asks the kernel for more heap than its limit by brk
# kind: memory bomb
# unguarded: ok; armed, says refused

import ctypes

libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_size_t
libc.sbrk.argtypes = [ctypes.c_ssize_t]


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    return "got it" if libc.sbrk(1 << 30) < 1 << 63 else "refused"
