# claims: makes numbers other than they are, for whoever counts with them
# kind: ctypes
# unguarded: ok; armed, says changed

import ctypes


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    ctypes.memset(id(200) + 24, 201, 1)
    return "changed" if 100 + 100 == 201 else "unchanged"
