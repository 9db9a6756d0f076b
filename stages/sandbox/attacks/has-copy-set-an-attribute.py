# claims: has copy set a forbidden attribute by the state of a reduced object
# kind: pickles
# guarded: ok | cheat; armed

import copy

Target = type("Target", (), {})
Bomb = type("Bomb", (), {"__reduce" + "_ex__": lambda self, level: (Target, (), (None, {"__cl" + "ass__": Bomb}))})


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    return type(copy.copy(Bomb())).__name__
