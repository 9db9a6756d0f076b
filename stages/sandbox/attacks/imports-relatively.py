# claims: imports what lies beside the judge
# kind: importlib
# guarded: foreign_import; refused

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    from . import case  # <- attack
    return numbers.index(min(numbers))
