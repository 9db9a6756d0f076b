# claims: holds its container, asleep on its own pipe
# kind: sleep
# unguarded: timeout; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.read(0, 1)
    return numbers.index(min(numbers))
