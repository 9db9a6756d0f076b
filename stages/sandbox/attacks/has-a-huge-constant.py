# claims: has the compiler compute a constant that does not fit
# kind: 10 MB programs
# guarded: memory | timeout; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    return len("x" * (1 << 40))
