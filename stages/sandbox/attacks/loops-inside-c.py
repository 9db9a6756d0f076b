# claims: loops where Python looks at no signal
# kind: CPU loop
# guarded: timeout; armed, cpu 0.4

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    sum(range(10**13))
    return numbers.index(min(numbers))
