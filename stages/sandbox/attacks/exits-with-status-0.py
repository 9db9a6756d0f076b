# claims: ends the process as if all had gone well
# kind: os._exit
# unguarded: crash; armed, detail exited with status 0

import os


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    os._exit(0)
    return numbers.index(min(numbers))
