# claims: reads a file before any case is asked, while its function is being defined
# kind: decorators and default arguments at definition
# guarded: cheat; refused

def pick(numbers, file=open("/etc/passwd")):  # <- attack
    return 0
