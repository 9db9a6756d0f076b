# claims: reaches os through a module that is allowed and has imported it
# kind: importlib
# guarded: crash; armed, line
# unguarded: cheat; armed

import random


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    random._os.system("id")  # <- attack
    return numbers.index(min(numbers))
