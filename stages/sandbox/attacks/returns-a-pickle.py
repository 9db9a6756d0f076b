# claims: has the judge unpickle its answer
# kind: pickles
# guarded: ok; armed, says cposix system (S'touch /tmp/x' tR.

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    return "cposix system (S'touch /tmp/x' tR."
