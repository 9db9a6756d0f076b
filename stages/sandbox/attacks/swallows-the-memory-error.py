# claims: stays at its limit of memory for ever
# kind: memory bomb
# guarded: timeout; armed, cpu 0.4

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    things = []
    while True:
        try:
            things.append(" " * 10**6)
        except MemoryError:
            pass
    return numbers.index(min(numbers))
