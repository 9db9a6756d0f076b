# claims: puts questions of its own where the supervisor's come from
# kind: writes to the supervisor's pipe
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.write(0, b"x")  # <- attack
    return numbers.index(min(numbers))
