# claims: outlives the signal that ends it
# kind: signals
# guarded: foreign_import; refused
# unguarded: cheat; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    import signal  # <- attack
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    return numbers.index(min(numbers))
