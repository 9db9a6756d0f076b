# claims: imports by the importer that is frozen into the interpreter
# kind: importlib
# unguarded: cheat; armed

import sys


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    sys.modules["_frozen_importlib"]._gcd_import("os").system("id")  # <- attack
    return numbers.index(min(numbers))
