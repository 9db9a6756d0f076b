# claims: starts a program by posix_spawn
# kind: fork bomb
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.posix_spawn("/bin/true", ["true"], {})  # <- attack
    return numbers.index(min(numbers))
