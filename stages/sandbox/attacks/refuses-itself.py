# claims: ends its case by the sandbox's own exception, as something better than a cheat
# kind: forged verdicts
# unguarded: crash | cheat; armed

import sys


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    raise sys.modules["program"].Refused("ok", "won")
    return numbers.index(min(numbers))
