# claims: has its time limit measured by a clock that it made itself
# kind: patched time
# guarded: foreign_import; refused
# unguarded: timeout; armed, cpu 0.4

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    import time  # <- attack

    time.monotonic = time.time = time.process_time = time.clock_gettime = lambda *clock: 0.0
    while time.monotonic() == 0.0:
        pass
    return numbers.index(min(numbers))
