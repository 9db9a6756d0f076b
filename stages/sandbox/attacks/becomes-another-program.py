# claims: replaces itself by a program without Python's limits
# kind: fork bomb
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.execv("/usr/bin/python3", ["python3", "-c", "print()"])  # <- attack
    return numbers.index(min(numbers))
