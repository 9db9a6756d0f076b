# claims: gets the builtins as a name that an allowed module has by accident
# kind: __import__
# guarded: cheat; refused

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    from random import __builtins__  # <- attack
    return numbers.index(min(numbers))
