# claims: overflows the stack of the interpreter, below its own count
# kind: CPU loop
# guarded: crash; armed, detail RecursionError

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    nest = []
    for _ in range(10**5):
        nest = [nest]
    other = []
    for _ in range(10**5):
        other = [other]
    nest == other
    return numbers.index(min(numbers))
