# claims: opens files with the builtins of its own function's module
# kind: builtins through __globals__
# guarded: cheat; refused
# unguarded: cheat; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    names = pick.__globals__["__builtins__"]  # <- attack
    (names if isinstance(names, dict) else vars(names))["open"]("/etc/passwd")
    return numbers.index(min(numbers))
