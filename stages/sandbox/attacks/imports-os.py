# claims: has the operating system's functions
# kind: importlib
# guarded: foreign_import; refused
# unguarded: cheat; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    from os import path, system  # <- attack

    system("id")
    return numbers.index(min(numbers))
