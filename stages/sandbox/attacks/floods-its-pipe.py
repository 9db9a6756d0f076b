# claims: fills the supervisor's memory
# kind: output flood
# unguarded: cheat; armed

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    while True:
        os.write(1, b"x" * 65536)
    return numbers.index(min(numbers))
