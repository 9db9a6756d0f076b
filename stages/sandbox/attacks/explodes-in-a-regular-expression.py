# claims: has the matcher backtrack for years
# kind: CPU loop
# guarded: foreign_import; refused
# unguarded: timeout; armed, cpu 0.4

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    import re  # <- attack

    re.match("(a|aa)+$", "a" * 200 + "b")
    return numbers.index(min(numbers))
