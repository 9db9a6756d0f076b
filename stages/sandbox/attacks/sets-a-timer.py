# claims: has itself interrupted later, when another program runs
# kind: signals
# unguarded: cheat; armed

import signal


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    signal.alarm(1)  # <- attack
    return numbers.index(min(numbers))
