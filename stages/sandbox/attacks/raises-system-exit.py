# claims: ends the process before it can lose
# kind: sys.exit
# guarded: crash; armed, line
# unguarded: crash; armed, line

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    raise SystemExit(0)  # <- attack
    return numbers.index(min(numbers))
