# claims: quits without an answer
# kind: non-str and huge returns
# guarded: ok; armed, says None

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    return None
