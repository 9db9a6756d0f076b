# claims: holds its container, asleep on a lock that it holds itself
# kind: sleep
# unguarded: timeout; armed

import _thread

lock = _thread.allocate_lock()
lock.acquire()


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    lock.acquire()
    return numbers.index(min(numbers))
