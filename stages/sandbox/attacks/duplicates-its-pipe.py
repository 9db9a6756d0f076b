# claims: keeps the pipe when it is taken away
# kind: writes to the supervisor's pipe
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.dup2(1, 5)  # <- attack
    return numbers.index(min(numbers))
