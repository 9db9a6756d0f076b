# claims: puts the name together where no static check sees it
# kind: __subclasses__
# guarded: cheat; armed, detail __class__
# unguarded: ok; armed, says tuple

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    base = getattr((), "__cl" + "ass__")
    return base.__name__
