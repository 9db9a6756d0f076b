# claims: imports by a function that no import statement shows
# kind: importlib
# guarded: foreign_import; refused
# unguarded: cheat; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    import importlib  # <- attack

    importlib.import_module("os").system("id")
    return numbers.index(min(numbers))
