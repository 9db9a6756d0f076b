# claims: comes back to life each time that it is collected
# kind: generators and __del__ that outlive the case
# guarded: timeout | memory; armed, cpu 0.4

class Undead:
    def __del__(self):
        Undead()


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    while True:
        Undead()
    return numbers.index(min(numbers))
