# claims: runs bytecode that no compiler made, and reads beyond the stack with it
# kind: code objects
# unguarded: crash; armed, detail SIGSEGV|SIGABRT|SystemError|unknown opcode

def victim():
    return 1


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    garbage = victim.__code__.replace(co_code=bytes([100, 255] * 8 + [116, 255] * 8 + [83, 0]), co_consts=())
    victim.__code__ = garbage
    return victim()
