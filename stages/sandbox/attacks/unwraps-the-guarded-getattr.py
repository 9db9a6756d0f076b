# claims: gets the true getattr out of the one it was given
# kind: builtins through __globals__
# guarded: cheat; armed, detail __wrapped__|__closure__

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    getattr(getattr, "__clo" + "sure__")
    return numbers.index(min(numbers))
