# claims: turns an error that ends programs into a loop
# kind: except-in-a-loop
# guarded: timeout; armed, cpu 0.4

def deeper():
    try:
        deeper()
    except BaseException:
        deeper()


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    deeper()
    return numbers.index(min(numbers))
