# claims: reaches the judge's side of the process by a generator's frame
# kind: frames
# guarded: cheat; refused
# unguarded: ok; armed, says pipe

boxes = []


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    steps = (frame.f_back for frame in boxes)  # <- attack
    boxes.append(steps.gi_frame)
    frame = next(steps)
    while frame:
        if "pipe" in frame.f_locals:
            return "pipe"
        frame = frame.f_back
    return numbers.index(min(numbers))
