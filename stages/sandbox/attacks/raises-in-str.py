# claims: raises an exception that cannot be written down
# kind: non-str and huge returns
# guarded: crash; armed, line

class Silent(Exception):
    def __str__(self):
        raise self


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    raise Silent  # <- attack
    return numbers.index(min(numbers))
