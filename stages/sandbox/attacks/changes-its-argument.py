# claims: makes its wrong answer right by changing the question
# kind: mutating the board
# wins: 1
# guarded: ok; armed, says 0

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    numbers[:] = [9, 0, 0, 0, 0, 0, 0, 0]
    return 0
