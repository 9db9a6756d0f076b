# claims: forks twice, leaves its session and waits for the next program
# kind: setsid daemons
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    if not os.fork():  # <- attack
        os.setsid()
        if not os.fork():
            while True:
                pass
    return numbers.index(min(numbers))
