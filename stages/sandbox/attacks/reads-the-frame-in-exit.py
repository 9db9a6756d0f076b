# claims: is handed a traceback by a with statement
# kind: frames
# guarded: cheat; refused

class Context:
    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.frame = trace.tb_frame  # <- attack
        return True


def pick(numbers):
    with Context() as context:
        1 / 0
    return 0
