# claims: learns its process number, from which others can be guessed
# kind: /proc snooping
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.getpid()  # <- attack
    return numbers.index(min(numbers))
