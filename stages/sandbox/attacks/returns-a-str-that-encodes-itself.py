# claims: writes what it likes to the pipe by an encode of its own
# kind: non-str and huge returns
# guarded: crash | output_limit | ok; armed

class Answer(str):
    def __str__(self):
        return self

    def encode(self, *how):
        return b"0" * (2 << 20)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    return Answer("0")
