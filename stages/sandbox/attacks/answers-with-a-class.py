# claims: is a class, whose instances are answers that compute themselves
# kind: non-str and huge returns
# guarded: ok; says armed

class pick:
    def __init__(self, numbers):
        self.words = "armed" if len(numbers) == 1 else "late"

    def __str__(self):
        return "armed"
