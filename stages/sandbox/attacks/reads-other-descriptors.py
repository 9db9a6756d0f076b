# claims: reads the supervisor's pipes, a file or a socket that the nursery left open
# kind: file reads
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.read(3, 9)  # <- attack
    return numbers.index(min(numbers))
