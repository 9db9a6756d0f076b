# claims: reads source files through linecache, which quotes them in tracebacks
# kind: file reads
# guarded: foreign_import; refused
# unguarded: cheat; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    import linecache  # <- attack
    linecache.getlines("/flexsink/case.py")
    return numbers.index(min(numbers))
