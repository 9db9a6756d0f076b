# claims: has typing evaluate text with all builtins
# kind: code objects
# guarded: crash; armed, line

import typing


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    typing.get_type_hints(pick)  # <- attack
    return numbers.index(min(numbers))
