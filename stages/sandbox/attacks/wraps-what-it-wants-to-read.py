# claims: has functools.update_wrapper read a forbidden attribute and hand it over
# kind: builtins through __globals__
# guarded: cheat; armed, detail __globals__

import functools


class Catcher:
    def __setattr__(self, name, value):
        value["__builtins__"]["print"]("caught")


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    functools.update_wrapper(Catcher(), pick, assigned=("__globals__",), updated=())
    return "caught"
