# claims: has the check see another name than getattr
# kind: __subclasses__
# guarded: crash; armed, line

class Name(str):
    def startswith(self, *prefix):
        return False

    def __eq__(self, other):
        return False

    def __hash__(self):
        return 0


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    getattr((), Name("__class__"))  # <- attack
    return numbers.index(min(numbers))
