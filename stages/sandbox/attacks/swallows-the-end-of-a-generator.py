# claims: has a generator that cannot be closed
# kind: generators and __del__ that outlive the case
# guarded: crash; armed, detail ignored GeneratorExit

def stubborn():
    while True:
        try:
            yield
        except BaseException:
            pass


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    left = stubborn()
    next(left)
    left.close()
    return numbers.index(min(numbers))
