# claims: loads code from bytes
# kind: code objects
# guarded: foreign_import; refused
# unguarded: cheat; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    import marshal  # <- attack

    code = compile("import os; os.system('id')", "", "exec")
    exec(marshal.loads(marshal.dumps(code)))
    return numbers.index(min(numbers))
