# claims: locks memory that the machine keeps for others (MAP_HUGETLB, MAP_LOCKED)
# kind: memory bomb
# unguarded: ok; armed, says refused

import ctypes

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_size_t


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    huge = libc.mmap(0, 1 << 21, 3, 0x40022, -1, 0)
    locked = libc.mmap(0, 1 << 21, 3, 0x2022, -1, 0)
    return "got it" if min(huge, locked) < 1 << 63 else "refused"
