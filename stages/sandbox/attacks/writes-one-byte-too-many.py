# claims: puts a byte before its answer
# kind: writes to the supervisor's pipe
# unguarded: cheat; armed, detail supervisor's pipe

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.write(1, b"x")
    return numbers.index(min(numbers))
