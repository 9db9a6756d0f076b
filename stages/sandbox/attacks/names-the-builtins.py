# claims: opens files with the builtins by their own name
# kind: builtins through __globals__
# guarded: cheat; refused

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    __builtins__["open"]("/etc/passwd")  # <- attack
    return numbers.index(min(numbers))
