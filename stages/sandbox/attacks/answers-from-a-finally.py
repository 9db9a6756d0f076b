# claims: answers although it failed
# kind: except-in-a-loop
# guarded: ok; armed, says survived

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    try:
        1 / 0
    finally:
        return "survived"
    return numbers.index(min(numbers))
