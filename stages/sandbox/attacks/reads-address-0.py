# claims: dies by a signal in the middle of an answer
# kind: signals
# unguarded: crash; armed, detail SIGSEGV

import ctypes


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    ctypes.string_at(0)  # <- attack
    return numbers.index(min(numbers))
