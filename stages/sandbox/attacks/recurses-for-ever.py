# claims: overflows the stack
# kind: CPU loop
# guarded: crash; armed, detail RecursionError

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    pick(numbers)
    return numbers.index(min(numbers))
