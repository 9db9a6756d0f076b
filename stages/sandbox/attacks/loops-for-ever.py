# claims: keeps the judge waiting
# kind: CPU loop
# guarded: timeout; armed, cpu 0.4

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    while True:
        pass
    return numbers.index(min(numbers))
