"""The system call filters, against an interpreter of classic BPF that this test brings along."""

import importlib.util
import json
import struct
from pathlib import Path
from types import ModuleType

import pytest

KILL, ALLOW, NO_FILE = 0x80000000, 0x7FFF0000, 0x00050002
X86_64, AARCH64, I386 = 0xC000003E, 0xC00000B7, 0x40000003
# Read from the kernel's own tables for x86_64, a second time, by name.
READ, WRITE, OPEN, MMAP, MPROTECT, CLONE, EXECVE, PRCTL, OPENAT, EXIT_GROUP, GETRANDOM, FUTEX = (
    0,
    1,
    2,
    9,
    10,
    56,
    59,
    157,
    257,
    231,
    318,
    202,
)


@pytest.fixture(scope="module")
def bpf() -> ModuleType:
    path = Path(__file__).parents[1] / "containers" / "sandbox" / "bpf.py"
    spec = importlib.util.spec_from_file_location("bpf", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(program: bytes, *, number: int, arch: int = X86_64, arguments: tuple[int, ...] = ()) -> int:
    """Returns what the filter answers to one system call."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    instructions = list(struct.iter_unpack("<HBBI", program))
    accumulator = position = 0
    while True:
        code, if_true, if_false, operand = instructions[position]
        position += 1
        match code:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS
                (accumulator,) = struct.unpack_from("<I", data, operand)
            case 0x54:  # BPF_ALU | BPF_AND | BPF_K
                accumulator &= operand
            case 0x06:  # BPF_RET | BPF_K
                return operand
            case 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
                position += if_true if accumulator == operand else if_false
            case 0x35:  # BPF_JGE
                position += if_true if accumulator >= operand else if_false
            case 0x45:  # BPF_JSET
                position += if_true if accumulator & operand else if_false
            case _:
                raise AssertionError(f"code {code:#x}")


def test_a_running_program_may_do_14_things_and_no_other(bpf: ModuleType) -> None:
    program = bpf.assemble("x86_64", compiling=False)
    allowed = [
        number for number in range(600) if run(program, number=number, arguments=(1 if number == 1 else 0,)) == ALLOW
    ]
    # read write mmap mprotect munmap brk rt_sigreturn mremap madvise exit futex clock_gettime exit_group getrandom
    assert allowed == [0, 1, 9, 10, 11, 12, 15, 25, 28, 60, 202, 228, 231, 318]
    assert {run(program, number=number) for number in range(600) if number not in allowed} == {KILL}


def test_the_compiler_finds_no_file_and_may_add_a_filter(bpf: ModuleType) -> None:
    program = bpf.assemble("x86_64", compiling=True)
    assert run(program, number=OPENAT) == NO_FILE
    assert run(program, number=PRCTL, arguments=(22,)) == ALLOW
    assert run(program, number=PRCTL, arguments=(38,)) == KILL
    running = bpf.assemble("x86_64", compiling=False)
    assert run(running, number=OPENAT) == run(running, number=PRCTL, arguments=(22,)) == KILL


@pytest.mark.parametrize("compiling", [True, False])
def test_arguments_decide_about_pipes_and_executable_memory(bpf: ModuleType, compiling: bool) -> None:
    program = bpf.assemble("x86_64", compiling=compiling)
    assert run(program, number=READ, arguments=(0,)) == ALLOW
    assert run(program, number=READ, arguments=(1,)) == KILL
    assert run(program, number=WRITE, arguments=(1,)) == ALLOW
    assert run(program, number=WRITE, arguments=(2,)) == KILL
    for number in (MMAP, MPROTECT):
        assert run(program, number=number, arguments=(0, 4096, 3)) == ALLOW
        assert run(program, number=number, arguments=(0, 4096, 7)) == KILL
        assert run(program, number=number, arguments=(0, 4096, 4)) == KILL
    private, realtime, wait_requeue, lock = 128, 256, 11, 6
    for operation in (0, 1, 9, 10, 0 | private, 1 | private, 9 | private | realtime):
        assert run(program, number=FUTEX, arguments=(4096, operation)) == ALLOW
    for operation in (lock, wait_requeue, lock | private, 2, 3, 4, 5, 7, 8, 12, 13, 14):
        assert run(program, number=FUTEX, arguments=(4096, operation)) == KILL
    for number in (OPEN, CLONE, EXECVE):
        assert run(program, number=number) == KILL


def test_other_architectures_and_x32_numbers_are_killed(bpf: ModuleType) -> None:
    program = bpf.assemble("x86_64", compiling=False)
    assert run(program, number=EXIT_GROUP) == ALLOW
    assert run(program, number=EXIT_GROUP, arch=I386) == KILL
    assert run(program, number=EXIT_GROUP, arch=AARCH64) == KILL
    assert run(program, number=GETRANDOM | 0x40000000) == KILL
    assert run(bpf.assemble("aarch64", compiling=False), number=94, arch=AARCH64) == ALLOW


# What the issue of the sandbox's walls names, and what reaches other processes, files of no name, or new namespaces.
CLOSED = {
    "socket": 41,
    "connect": 42,
    "bind": 49,
    "execve": 59,
    "ptrace": 101,
    "mount": 165,
    "keyctl": 250,
    "unshare": 272,
    "perf_event_open": 298,
    "setns": 308,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "bpf": 321,
    "execveat": 322,
    "userfaultfd": 323,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "pidfd_getfd": 438,
    "open_by_handle_at": 304,
}


def test_a_supervisor_without_docker_may_not_do_what_is_closed(bpf: ModuleType) -> None:
    not_permitted, not_implemented, clone3, sigchld, clone_parent = 0x00050001, 0x00050026, 435, 17, 0x8000
    program = bpf.assemble_supervisor("x86_64")
    assert {name: run(program, number=number) for name, number in CLOSED.items()} == dict.fromkeys(
        CLOSED, not_permitted
    )
    assert run(program, number=clone3) == not_implemented
    assert run(program, number=CLONE, arguments=(sigchld,)) == ALLOW
    assert run(program, number=CLONE, arguments=(clone_parent | sigchld,)) == ALLOW
    for namespace in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert run(program, number=CLONE, arguments=(namespace | sigchld,)) == not_permitted
    assert run(program, number=OPENAT) == run(program, number=WRITE, arguments=(2,)) == ALLOW
    assert run(program, number=EXIT_GROUP, arch=I386) == run(program, number=READ | 0x40000000) == KILL


def test_a_container_may_not_do_what_is_closed_either() -> None:
    path = Path(__file__).parents[1] / "containers" / "sandbox" / "seccomp.json"
    profile = json.loads(path.read_text())
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    allowed = {name for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}
    assert allowed & set(CLOSED) == {"execve"}  # by which its own entry point is started
    assert not allowed & {"clone3", "add_key", "request_key", "memfd_create", "landlock_create_ruleset"}
    assert {"action": "SCMP_ACT_ERRNO", "errnoRet": 38, "names": ["clone3"]}.items() <= profile["syscalls"][-1].items()


def test_an_unknown_machine_is_refused(bpf: ModuleType) -> None:
    with pytest.raises(KeyError):
        bpf.assemble("riscv64", compiling=False)
