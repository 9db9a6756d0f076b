# claims: learns what lies in the container by asking for a file's size
# kind: file reads
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.stat("/flexsink/supervisor.py")  # <- attack
    return numbers.index(min(numbers))
