# claims: grows in small steps until the container is killed
# kind: memory bomb
# guarded: memory; armed, detail MemoryError

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    things = []
    while True:
        things.append(" " * 1000)
    return numbers.index(min(numbers))
