# claims: sees the other processes
# kind: /proc snooping
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.listdir("/proc")  # <- attack
    return numbers.index(min(numbers))
