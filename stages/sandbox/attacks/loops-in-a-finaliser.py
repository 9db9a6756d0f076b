# claims: goes on in a finaliser that runs at once
# kind: generators and __del__ that outlive the case
# guarded: timeout; armed, cpu 0.4

class Last:
    def __del__(self):
        while True:
            pass


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    Last()
    return numbers.index(min(numbers))
