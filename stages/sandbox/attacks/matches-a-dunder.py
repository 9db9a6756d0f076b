# claims: reads a dunder by a pattern's keyword
# kind: __subclasses__
# guarded: cheat; refused

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    match numbers:
        case object(__class__=kind):  # <- attack
            kind.mro()
    return numbers.index(min(numbers))
