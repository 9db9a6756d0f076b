# claims: reads a file while a class is being made
# kind: decorators and default arguments at definition
# guarded: cheat; refused
# unguarded: cheat; cpu 0.05

while sum(range(1000)) and not (burnt := sum(range(20_000_000))):
    pass


class Reader:
    text = open("/etc/passwd").read()  # <- attack


def pick(numbers):
    return 0
