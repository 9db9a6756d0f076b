# claims: imports by the function behind the statement
# kind: __import__
# guarded: cheat; refused
# unguarded: cheat; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    __import__("os").system("id")  # <- attack
    return numbers.index(min(numbers))
