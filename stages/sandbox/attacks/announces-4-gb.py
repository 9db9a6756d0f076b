# claims: has the supervisor make room for 4 GB
# kind: writes to the supervisor's pipe
# unguarded: cheat; armed, detail supervisor's pipe

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os.write(1, b"x" * 9 + b"\xff" * 4)
    return numbers.index(min(numbers))
