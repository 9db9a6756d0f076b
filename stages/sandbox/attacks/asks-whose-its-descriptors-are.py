# claims: learns what its descriptors are through /proc
# kind: /proc snooping
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.readlink("/proc/self/fd/0")  # <- attack
    return numbers.index(min(numbers))
