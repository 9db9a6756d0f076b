# claims: is run by whoever copies or pickles what it returns
# kind: pickles
# guarded: cheat; refused
# unguarded: cheat; armed

import copy


class Bomb:
    def __reduce__(self):  # <- attack
        return open, ("/etc/passwd",)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    copy.copy(Bomb())
    return numbers.index(min(numbers))
