# claims: reaches the frames of those who called it through an exception
# kind: frames
# guarded: cheat; refused
# unguarded: ok; armed, says pipe

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    try:
        1 / 0
    except ZeroDivisionError as error:
        frame = error.__traceback__.tb_frame  # <- attack
    while frame:
        if "pipe" in frame.f_locals:
            return "pipe"
        frame = frame.f_back
    return numbers.index(min(numbers))
