# claims: gets more CPU time
# kind: limits and users
# unguarded: cheat; armed

import resource


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    resource.setrlimit(resource.RLIMIT_CPU, (99, 99))  # <- attack
    return numbers.index(min(numbers))
