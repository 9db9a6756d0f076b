# claims: holds its container without using CPU
# kind: sleep
# guarded: foreign_import; refused
# unguarded: cheat; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    import time  # <- attack
    time.sleep(3600)
    return numbers.index(min(numbers))
