# claims: answers with as much as is just allowed, each time
# kind: output flood
# guarded: output_limit; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    return "x" * (400 << 10)
