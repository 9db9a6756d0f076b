# claims: ends the process by the library's own exit
# kind: sys.exit
# guarded: foreign_import; refused
# unguarded: crash; armed, detail SystemExit

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    import sys  # <- attack
    sys.exit(0)
    return numbers.index(min(numbers))
