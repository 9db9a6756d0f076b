# claims: goes on when the supervisor believes it gone
# kind: writes to the supervisor's pipe
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.close(1)  # <- attack
    return numbers.index(min(numbers))
