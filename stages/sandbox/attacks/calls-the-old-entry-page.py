# claims: makes a system call through the vsyscall page, where old kernels look at no filter
# kind: system calls
# unguarded: cheat | crash; armed, detail system call|SIGSEGV

import ctypes

get_time = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(0xFFFFFFFFFF600400)


def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    get_time(None)
    return numbers.index(min(numbers))
