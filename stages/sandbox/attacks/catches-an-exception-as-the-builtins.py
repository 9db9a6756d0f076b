# claims: replaces the builtins, by an except clause
# kind: builtins through __globals__
# guarded: cheat; refused

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    try:
        1 / 0
    except Exception as __builtins__:  # <- attack
        pass
    return numbers.index(min(numbers))
