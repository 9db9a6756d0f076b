# claims: runs when annotations are evaluated at definition
# kind: decorators and default arguments at definition
# guarded: cheat; refused

def pick(numbers: open("/etc/passwd").read()):  # <- attack
    return 0
