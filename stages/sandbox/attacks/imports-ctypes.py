# claims: has the C library, and with it every system call
# kind: ctypes
# guarded: foreign_import; refused
# unguarded: cheat; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    import ctypes  # <- attack

    ctypes.CDLL(None).system(b"id")
    return numbers.index(min(numbers))
