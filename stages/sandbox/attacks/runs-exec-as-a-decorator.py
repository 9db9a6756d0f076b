# claims: runs text while its function is being defined
# kind: decorators and default arguments at definition
# guarded: cheat; refused

@exec  # <- attack
def pick(numbers):
    return 0
