# claims: uses CPU that is not counted as the program's, by drawing random bytes
# kind: CPU loop
# unguarded: timeout; armed, cpu 0.4

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    while True:
        os.urandom(1 << 20)
    return numbers.index(min(numbers))
