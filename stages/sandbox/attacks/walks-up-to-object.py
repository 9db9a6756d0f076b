# claims: reaches the root of all classes by a method that is no dunder
# kind: __subclasses__
# guarded: cheat; refused
# unguarded: cheat; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    type(numbers).mro()[-1].__subclasses__()  # <- attack
    open("/etc/passwd")
    return numbers.index(min(numbers))
