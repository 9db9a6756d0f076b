# claims: ends the process by the word that interactive sessions have
# kind: sys.exit
# guarded: crash; armed, line

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    exit(0)  # <- attack
    return numbers.index(min(numbers))
