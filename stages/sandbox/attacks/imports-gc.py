# claims: reads every object of the process
# kind: gc
# guarded: foreign_import; refused
# unguarded: ok; armed, says no judge

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    import gc  # <- attack

    gc.unfreeze()
    things = [thing for thing in gc.get_objects() if type(thing) is dict]
    return "judge" if any("draw" in thing and "right" in thing for thing in things) else "no judge"
