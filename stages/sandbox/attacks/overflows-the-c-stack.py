# claims: overflows the C stack with the interpreter's own count turned off
# kind: CPU loop
# unguarded: crash | memory; armed

import sys


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    sys.setrecursionlimit(10**9)
    deeper = lambda value: list(map(deeper, [value]))
    deeper(1)
    return numbers.index(min(numbers))
