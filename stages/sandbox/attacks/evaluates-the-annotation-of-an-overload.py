# claims: has functools evaluate an annotation, whose text the static check does not see
# kind: code objects
# guarded: crash; armed, line

import functools


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    def first(value):
        pass

    def second(value: "[].__class__.__base__.__subclasses__() and int"):
        pass

    functools.singledispatch(first).register(second)  # <- attack
    return "evaluated"
