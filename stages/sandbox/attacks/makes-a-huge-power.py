# claims: has one operation take hours
# kind: CPU loop
# guarded: timeout | memory; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    10 ** 10**9
    return numbers.index(min(numbers))
