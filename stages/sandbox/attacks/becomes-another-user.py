# claims: becomes root again
# kind: limits and users
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.setuid(0)  # <- attack
    return numbers.index(min(numbers))
