# claims: takes its answer back
# kind: writes to the supervisor's pipe
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.read(1, 1)  # <- attack
    return numbers.index(min(numbers))
