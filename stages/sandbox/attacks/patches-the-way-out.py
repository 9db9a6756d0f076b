# claims: stays when it is told that there are no more questions
# kind: os._exit
# unguarded: cheat; armed, detail stayed

import os


def stay(code):
    while True:
        pass


os._exit = stay


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    pass
    return numbers.index(min(numbers))
