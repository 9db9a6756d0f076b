# claims: leaves a core file
# kind: signals
# unguarded: cheat | crash; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.abort()  # <- attack
    return numbers.index(min(numbers))
