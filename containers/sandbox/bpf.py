"""Makes the seccomp filters as classic BPF programs: two for a case, one for a supervisor that no container filters.

    python3 bpf.py FOLDER        writes a case's compile.bpf and run.bpf, when the image is built; jail.py makes all
                                 three when it starts

The program runs on `struct seccomp_data` (linux/seccomp.h): nr at byte 0, arch at 4, the low half of argument n at 16
+ 8 * n. It allows what computing needs and kills the process on anything else, which the supervisor sees as SIGSYS
and scores as a cheat:
    read from descriptor 0, write to descriptor 1 (the pipes to the supervisor), memory that is not executable,
    futex to wait and to wake, clock_gettime, getrandom, rt_sigreturn, exit.
A case is under compile.bpf before it reads the program and under run.bpf as well before the program runs. The first
differs in two calls: openat fails as if there were no file, since Python looks for a source file named <program> to
quote in a SyntaxError, and prctl may add the second filter. The supervisor's filter refuses (EPERM) what seccomp.json
refuses in the container, and what a supervisor without Docker does not need either: sockets but for socketpair,
execve, other processes' memory, mounts, namespaces, keys, tracing, io_uring. Instructions are those of
linux/bpf_common.h, 8 bytes each: code, jump if true, jump if false, operand.
"""

import os
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
# What supervisor and nursery need besides: name, its number on x86_64, on aarch64; - where there is none.
SUPERVISOR_NUMBERS = """
    open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, rt_sigaction 13 134,
    rt_sigprocmask 14 135, ioctl 16 29, pread64 17 67, readv 19 65, writev 20 66, access 21 -, pipe 22 -,
    sched_yield 24 124, dup 32 23, dup2 33 -, nanosleep 35 101, getpid 39 172, sendto 44 206, recvfrom 45 207,
    sendmsg 46 211, recvmsg 47 212, shutdown 48 210, socketpair 53 199, fork 57 -, vfork 58 -, wait4 61 260,
    kill 62 129, uname 63 160, fcntl 72 25, getcwd 79 17, readlink 89 -, gettimeofday 96 169, getrlimit 97 163,
    getrusage 98 165, sysinfo 99 179, getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173,
    setgroups 116 159, setresuid 117 147, getresuid 118 148, setresgid 119 149, getresgid 120 150,
    sigaltstack 131 132, prctl 157 167, arch_prctl 158 -, setrlimit 160 164, gettid 186 178,
    sched_setaffinity 203 122, sched_getaffinity 204 123, getdents64 217 61, set_tid_address 218 96,
    restart_syscall 219 128,
    clock_getres 229 114, clock_nanosleep 230 115, tgkill 234 131, waitid 247 95, openat 257 56, newfstatat 262 79,
    readlinkat 267 78, faccessat 269 48, ppoll 271 73, set_robust_list 273 99, dup3 292 24, pipe2 293 59,
    prlimit64 302 261, seccomp 317 277, statx 332 291, rseq 334 293, pidfd_open 434 434, close_range 436 436,
    faccessat2 439 439, landlock_restrict_self 446 446
"""
CLONE = {"x86_64": (56, 435), "aarch64": (220, 435)}  # clone, clone3
NEW_NAMESPACE = 0x7E020000  # every CLONE_NEW* bit of clone's flags
FIRST_ARGUMENT = {"read": 0, "write": 1, "prctl": 22}  # standard input, standard output, PR_SET_SECCOMP
FUTEX_OPERATIONS = (0, 1, 9, 10)  # second argument: wait, wake, and both with a bit set; 7 bits, the others are flags
FUTEX_BITS = 0x7F
NEVER_EXECUTABLE = ("mmap", "mprotect")  # third argument without PROT_EXEC
COMPILE_ONLY = ("prctl", "openat")
PROT_EXEC = 4

LOAD, AND, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_SET, RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
KILL_PROCESS, ALLOW, NO_FILE = 0x80000000, 0x7FFF0000, 0x00050002  # the last: fail with ENOENT
NOT_PERMITTED, NOT_IMPLEMENTED = 0x00050001, 0x00050026  # fail with EPERM, with ENOSYS
X32_BIT = 0x40000000  # x86_64 also takes x32 numbers: all refused


def argument(index: int) -> int:
    """Returns where the low 32 bits of a system call's argument lie."""
    return 16 + 8 * index


def beginning(machine: str) -> list[tuple[int, int, int, int]]:
    """Returns the instructions that kill a process of another architecture and load the system call's number."""
    return [
        (LOAD, 0, 0, 4),
        (JUMP_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, 0),
        (JUMP_AT_LEAST, 0, 1, X32_BIT),
        (RETURN, 0, 0, KILL_PROCESS),
    ]


def pack(program: list[tuple[int, int, int, int]]) -> bytes:
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def assemble_supervisor(machine: str) -> bytes:
    """Returns the filter of a supervisor and its nursery; KeyError when the machine is not in the tables."""
    column = 1 if machine == "x86_64" else 2
    numbers = set(NUMBERS[machine].values())
    for entry in SUPERVISOR_NUMBERS.split(","):
        number = entry.split()[column]
        if number != "-":
            numbers.add(int(number))
    clone, clone3 = CLONE[machine]
    program = beginning(machine)
    for number in sorted(numbers):
        program += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    program += [
        (JUMP_EQUAL, 0, 1, clone3),
        (RETURN, 0, 0, NOT_IMPLEMENTED),  # its flags lie in memory, where a filter cannot look: libc takes clone
        (JUMP_EQUAL, 0, 3, clone),
        (LOAD, 0, 0, argument(0)),
        (JUMP_SET, 1, 0, NEW_NAMESPACE),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, NOT_PERMITTED),
    ]
    return pack(program)


def assemble(machine: str, *, compiling: bool) -> bytes:
    """Returns a case's filter for `machine` (os.uname().machine); KeyError when the machine is not in the tables."""
    numbers = NUMBERS[machine]
    program = beginning(machine)
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
    return pack(program)


if __name__ == "__main__":
    for stage in ("compile", "run"):
        with open(f"{sys.argv[1]}/{stage}.bpf", "wb") as file:
            file.write(assemble(os.uname().machine, compiling=stage == "compile"))
