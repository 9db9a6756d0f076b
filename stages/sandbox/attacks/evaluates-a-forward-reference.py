# claims: has typing evaluate text with all builtins, through the class behind it
# kind: code objects
# guarded: cheat; refused

import typing


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    typing.ForwardRef("1")._evaluate({}, {}, frozenset())  # <- attack
    return numbers.index(min(numbers))
