# claims: has a pickle run a command
# kind: pickles
# guarded: foreign_import; refused
# unguarded: cheat; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    import _pickle  # <- attack

    _pickle.loads(b"cposix\nsystem\n(S'id'\ntR.")
    return numbers.index(min(numbers))
