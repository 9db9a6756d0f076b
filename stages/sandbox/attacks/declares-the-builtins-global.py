# claims: replaces the builtins for every function, by a global statement
# kind: builtins through __globals__
# guarded: cheat; refused

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    global __builtins__  # <- attack
    return numbers.index(min(numbers))
