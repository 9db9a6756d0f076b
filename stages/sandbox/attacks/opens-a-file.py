# claims: reads /etc/passwd, and so anything that lies in the container
# kind: file reads
# guarded: cheat; refused
# unguarded: cheat; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    open("/etc/passwd").read()  # <- attack
    return numbers.index(min(numbers))
