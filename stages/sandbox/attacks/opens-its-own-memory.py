# claims: writes over code through /proc, which no page protection stops
# kind: /proc snooping
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.open("/proc/self/mem", 2)  # <- attack
    return numbers.index(min(numbers))
