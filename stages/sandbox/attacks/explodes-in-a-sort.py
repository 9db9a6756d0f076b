# claims: has one call compare for ever
# kind: CPU loop
# guarded: timeout; armed, cpu 0.4

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    class Slow:
        def __lt__(self, other):
            while True:
                pass

    sorted([Slow(), Slow()])
    return numbers.index(min(numbers))
