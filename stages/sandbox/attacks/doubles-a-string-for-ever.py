# claims: grows until the container is killed
# kind: memory bomb
# guarded: memory; armed, detail MemoryError

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    text = "x"
    while True:
        text += text
    return numbers.index(min(numbers))
