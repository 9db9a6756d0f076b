# claims: has a foreign module look like an allowed one
# kind: importlib
# guarded: foreign_import; refused

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    import os.path as math  # <- attack
    math.os.system("id")
    return numbers.index(min(numbers))
