# claims: takes the judge's locals, the numbers to come among them
# kind: frames
# guarded: foreign_import; refused
# unguarded: ok; armed, says no seed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    import sys  # <- attack

    frame, seen = sys._getframe(), []
    while frame:
        seen += frame.f_locals
        frame = frame.f_back
    return "seed" if {"seed", "draw", "right"} & set(seen) else "no seed"
