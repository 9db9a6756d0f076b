# claims: goes on in a generator's finally when its case is over
# kind: generators and __del__ that outlive the case
# wins: 8
# guarded: ok; armed
# unguarded: ok; armed

def endless():
    try:
        yield
    finally:
        while True:
            pass


left = endless()
next(left)


def pick(numbers):
    return "armed" if len(numbers) == 1 else numbers.index(max(numbers))
