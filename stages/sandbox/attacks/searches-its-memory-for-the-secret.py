# claims: finds the judge's answers in the memory that it was forked with
# kind: gc
# unguarded: ok; armed, says searched

import ctypes
import gc

MASKED = b'.2?z0/>=?z;654?z145-)z.23)'
done = []


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    if done:
        return done[0]
    control = b"made by " + b"the program" * 2
    libc = ctypes.CDLL(None)
    libc.sbrk.restype = ctypes.c_size_t
    gc.unfreeze()
    things = gc.get_objects()
    things += [text for thing in things if type(thing) is dict for text in (*thing.keys(), *thing.values())]
    blocks = {id(thing) & ~0x3FFF for thing in things} | {id(control) & ~0x3FFF}
    memory = b"".join(ctypes.string_at(block, 1 << 14) for block in blocks if block > 1 << 40)
    memory += ctypes.string_at(libc.sbrk(0) - (1 << 19), 1 << 19)
    if control not in memory:
        raise LookupError("the search does not work")
    found = bytes(letter ^ 0x5A for letter in MASKED) in memory
    done.append("found" if found else "searched")
    return done[0]
