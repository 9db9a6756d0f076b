# claims: fails in the harness, not in the program
# kind: non-str and huge returns
# guarded: crash; armed, line

class Answer:
    def __str__(self):
        return 1 / 0  # <- attack


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    return Answer()
