# claims: reads what the supervisor was started with
# kind: /proc snooping
# unguarded: cheat; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    open("/proc/1/environ", "rb").read()  # <- attack
    return numbers.index(min(numbers))
