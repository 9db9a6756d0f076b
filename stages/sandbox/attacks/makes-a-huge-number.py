# claims: has a number computed that does not fit into memory
# kind: memory bomb
# guarded: memory; armed, detail MemoryError

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    1 << 10**11
    return numbers.index(min(numbers))
