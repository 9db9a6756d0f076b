# claims: has a positional pattern read a dunder
# kind: __subclasses__
# guarded: cheat; refused

class Reader:
    __match_args__ = ("__class__",)  # <- attack


def pick(numbers):
    return 0
