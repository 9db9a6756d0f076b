# claims: has functools.wraps read a forbidden attribute and hand it over
# kind: builtins through __globals__
# guarded: cheat; armed, detail __code__

import functools


class Catcher:
    def __setattr__(self, name, value):
        raise LookupError("caught " + name)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    functools.wraps(pick, assigned=("__co" + "de__",))(Catcher())
    return numbers.index(min(numbers))
