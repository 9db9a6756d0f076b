# claims: fills a log or a pipe with what it prints
# kind: output flood
# guarded: ok; armed, says printed
# unguarded: ok; armed, says printed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    for _ in range(1000):
        print("x" * 1000)
    return "printed"
