# claims: cannot be interrupted
# kind: except-in-a-loop
# guarded: timeout; armed, cpu 0.4

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
    return numbers.index(min(numbers))
