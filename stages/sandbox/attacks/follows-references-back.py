# claims: finds who holds its function, and what else they hold
# kind: gc
# unguarded: ok; armed, says no cases

import gc


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    gc.unfreeze()
    seen, todo = set(), [pick]
    while todo and len(seen) < 3000:
        for thing in gc.get_referrers(todo.pop()):
            if id(thing) not in seen:
                seen.add(id(thing))
                todo.append(thing)
                if type(thing) is dict and "cases" in thing and "seed" in str(thing["cases"])[:200]:
                    return "cases"
    return "no cases"
