# claims: reads attributes by a format string, which no static check sees
# kind: frames
# guarded: ok; armed, says <class 'object'>

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    return "{0.__class__.__base__}".format(numbers)
