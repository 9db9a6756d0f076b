# claims: becomes other code after the static check
# kind: code objects
# guarded: cheat; refused
# unguarded: ok; armed, says changed

def changed(numbers):
    return "armed" if len(numbers) == 1 else "changed"


def pick(numbers):
    pick.__code__ = changed.__code__  # <- attack
    return "armed"
