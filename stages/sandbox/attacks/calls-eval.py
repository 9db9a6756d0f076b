# claims: runs text that the static check does not see
# kind: code objects
# guarded: cheat; refused
# unguarded: cheat; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    eval("__import__('os').system('id')")  # <- attack
    return numbers.index(min(numbers))
