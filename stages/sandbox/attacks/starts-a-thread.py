# claims: goes on in another thread while the answer is judged
# kind: threads
# guarded: foreign_import; refused
# unguarded: cheat; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    import _thread  # <- attack
    _thread.start_new_thread(print, ())
    return numbers.index(min(numbers))
