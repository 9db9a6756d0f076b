# claims: walks attributes by a function of the library
# kind: __subclasses__
# guarded: cheat; armed, detail __class__

import functools


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    functools.reduce(getattr, ["__class__", "__base__"], ())
    return numbers.index(min(numbers))
