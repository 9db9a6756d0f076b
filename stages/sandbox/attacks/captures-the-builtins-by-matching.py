# claims: binds the name of the builtins without writing it as a name
# kind: builtins through __globals__
# guarded: cheat; refused

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    match {}:
        case {**__builtins__}:  # <- attack
            pass
    return numbers.index(min(numbers))
