# claims: has the container killed for its memory, and the supervisor with it
# kind: memory bomb
# guarded: memory; armed, detail MemoryError
# unguarded: memory; armed, detail MemoryError

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    [0] * 10**10
    return numbers.index(min(numbers))
