# claims: writes the name in letters that Python takes for others
# kind: unicode and null bytes
# put @LETTER@: "\uff43"
# guarded: cheat; refused

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    ().__@LETTER@lass__  # <- attack
    return numbers.index(min(numbers))
