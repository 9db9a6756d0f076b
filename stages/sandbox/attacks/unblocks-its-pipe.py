# claims: changes how the pipe behaves for the supervisor (fcntl)
# kind: writes to the supervisor's pipe
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.set_blocking(0, False)  # <- attack
    return numbers.index(min(numbers))
