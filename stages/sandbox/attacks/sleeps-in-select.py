# claims: holds its container, asleep in poll
# kind: sleep
# unguarded: cheat; armed

import select


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    select.select([], [], [], 3600)  # <- attack
    return numbers.index(min(numbers))
