# claims: reads the supervisor's memory
# kind: /proc snooping
# unguarded: cheat; armed

import ctypes

libc = ctypes.CDLL(None)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    libc.process_vm_readv(1, None, 0, None, 0, 0)  # <- attack
    return numbers.index(min(numbers))
