# claims: answers with more than anybody can hold
# kind: non-str and huge returns
# guarded: output_limit | memory; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    return "x" * 10**8
