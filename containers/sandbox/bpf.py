"""Writes the two seccomp filters of a case as classic BPF programs, when the image is built.

    python3 bpf.py FOLDER        writes compile.bpf and run.bpf

The program runs on `struct seccomp_data` (linux/seccomp.h): nr at byte 0, arch at 4, the low half of argument n at 16
+ 8 * n. It allows what computing needs and kills the process on anything else, which the supervisor sees as SIGSYS
and scores as a cheat:
    read from descriptor 0, write to descriptor 1 (the pipes to the supervisor), memory that is not executable,
    futex to wait and to wake, clock_gettime, getrandom, rt_sigreturn, exit.
A case is under compile.bpf before it reads the program and under run.bpf as well before the program runs. The first
differs in two calls: openat fails as if there were no file, since Python looks for a source file named <program> to
quote in a SyntaxError, and prctl may add the second filter. Instructions are those of linux/bpf_common.h, 8 bytes
each: code, jump if true, jump if false, operand.
"""

import platform
import struct
import sys

# Numbers from the kernel's asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64); arch from linux/audit.h.
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
NUMBERS = {
    "x86_64": {
        "read": 0,
        "write": 1,
        "mmap": 9,
        "mprotect": 10,
        "munmap": 11,
        "brk": 12,
        "rt_sigreturn": 15,
        "mremap": 25,
        "madvise": 28,
        "exit": 60,
        "futex": 202,
        "clock_gettime": 228,
        "exit_group": 231,
        "getrandom": 318,
        "prctl": 157,
        "openat": 257,
    },
    "aarch64": {
        "read": 63,
        "write": 64,
        "exit": 93,
        "exit_group": 94,
        "futex": 98,
        "clock_gettime": 113,
        "rt_sigreturn": 139,
        "brk": 214,
        "munmap": 215,
        "mremap": 216,
        "mmap": 222,
        "mprotect": 226,
        "madvise": 233,
        "getrandom": 278,
        "prctl": 167,
        "openat": 56,
    },
}
FIRST_ARGUMENT = {"read": 0, "write": 1, "prctl": 22}  # standard input, standard output, PR_SET_SECCOMP
FUTEX_OPERATIONS = (0, 1, 9, 10)  # second argument: wait, wake, and both with a bit set; 7 bits, the others are flags
FUTEX_BITS = 0x7F
NEVER_EXECUTABLE = ("mmap", "mprotect")  # third argument without PROT_EXEC
COMPILE_ONLY = ("prctl", "openat")
PROT_EXEC = 4

LOAD, AND, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_SET, RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
KILL_PROCESS, ALLOW, NO_FILE = 0x80000000, 0x7FFF0000, 0x00050002  # the last: fail with ENOENT
X32_BIT = 0x40000000  # x86_64 also takes x32 numbers: all refused


def argument(index: int) -> int:
    """Returns where the low 32 bits of a system call's argument lie."""
    return 16 + 8 * index


def assemble(machine: str, *, compiling: bool) -> bytes:
    """Returns a filter for `machine` (platform.machine()); KeyError when the machine is not in the tables."""
    numbers = NUMBERS[machine]
    program = [
        (LOAD, 0, 0, 4),
        (JUMP_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, 0),
        (JUMP_AT_LEAST, 0, 1, X32_BIT),
        (RETURN, 0, 0, KILL_PROCESS),
    ]
    for name, number in numbers.items():
        if name in COMPILE_ONLY and not compiling:
            continue
        if name in FIRST_ARGUMENT:
            program += [
                (JUMP_EQUAL, 0, 4, number),
                (LOAD, 0, 0, argument(0)),
                (JUMP_EQUAL, 0, 1, FIRST_ARGUMENT[name]),
                (RETURN, 0, 0, ALLOW),
                (RETURN, 0, 0, KILL_PROCESS),
            ]
        elif name in NEVER_EXECUTABLE:
            program += [
                (JUMP_EQUAL, 0, 4, number),
                (LOAD, 0, 0, argument(2)),
                (JUMP_SET, 1, 0, PROT_EXEC),
                (RETURN, 0, 0, ALLOW),
                (RETURN, 0, 0, KILL_PROCESS),
            ]
        elif name == "futex":
            count = len(FUTEX_OPERATIONS)
            program += [
                (JUMP_EQUAL, 0, count + 4, number),
                (LOAD, 0, 0, argument(1)),
                (AND, 0, 0, FUTEX_BITS),
                *[(JUMP_EQUAL, count - place, 0, operation) for place, operation in enumerate(FUTEX_OPERATIONS)],
                (RETURN, 0, 0, KILL_PROCESS),
                (RETURN, 0, 0, ALLOW),
            ]
        else:
            program += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, NO_FILE if name == "openat" else ALLOW)]
    program.append((RETURN, 0, 0, KILL_PROCESS))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


if __name__ == "__main__":
    for stage in ("compile", "run"):
        with open(f"{sys.argv[1]}/{stage}.bpf", "wb") as file:
            file.write(assemble(platform.machine(), compiling=stage == "compile"))
