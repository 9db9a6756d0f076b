# claims: talks past the supervisor
# kind: output flood
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.write(2, b"x")  # <- attack
    return numbers.index(min(numbers))
