"""The nursery, from which every case is forked, and the case: the process in which one program runs.

The nursery is forked from the supervisor before that has read a byte, and never learns more than the harnesses:
neither it nor what is forked from it holds seeds, answers or nonces. Asked over its socket, it forks a case onto the
two pipe ends that came with the question, as a child of the supervisor and not its own, so that the supervisor alone
waits for it.

A case is another uid, has rlimits, no privileges to gain, the two pipes as its only descriptors and the first system
call filter of bpf.py before it reads the program, and the second before it runs it. Where there is no other uid to be
had (jail.py) a Landlock domain of its own, in which nothing is allowed, keeps it from the supervisor's processes.

Frames: question = nonce (8 bytes), length (4), payload; answer = the question's nonce, kind (1 byte), length (4),
payload.
    kinds: R the program is loaded (payload: notes on it, program.py), M an answer, X the program ended (payload:
    outcome, newline, detail)
The first question is the program as JSON: {"program", "entry", "harness", "guarded"}.
"""

import builtins
import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import socket
import struct
import sys
import types
from typing import Any, NamedTuple, NoReturn

import program as programs

CASE_UID = 10001
SWEEP_UID = 10002  # no process ever has it: while the supervisor sweeps, no case may signal the supervisor
ORDER = struct.Struct("<QQ")  # memory bytes, CPU seconds
QUESTION = struct.Struct("<8sI")
ANSWER = struct.Struct("<8scI")
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
LANDLOCK_RESTRICT_SELF = 446
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE_PARENT = 0x8000
FOLDER = os.path.dirname(os.path.abspath(__file__))
STACK_BYTES = 16 << 20
MAX_DETAIL = 400


class Place(NamedTuple):
    """Where supervisor and cases find themselves. What is written here is the container; jail.py makes others.

    case_uid, sweep_uid: None where there is one uid for all. sweep: how processes that a case left are killed: as its
    uid, by name from the list of children, or with everything in the pid namespace, the supervisor being its process 1.
    """

    case_uid: int | None = CASE_UID
    sweep_uid: int = SWEEP_UID
    sweep: str = "uid"
    compile_filter: bytes = b""  # empty: in a file beside this one
    run_filter: bytes = b""
    landlock: int = -1  # descriptor of a Landlock ruleset for cases
    family: int = -1  # descriptor of the supervisor's list of children; -1: it opens that itself
    ticks: int = -1  # descriptor of /proc/stat, likewise


def read_filter(name: str) -> bytes:
    with open(os.path.join(FOLDER, name), "rb") as file:
        return file.read()


class Filter(ctypes.Structure):
    """struct sock_fprog of linux/filter.h, over instructions."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]

    def __init__(self, text: bytes) -> None:
        self.buffer = ctypes.create_string_buffer(text, len(text))
        super().__init__(len(text) // 8, ctypes.addressof(self.buffer))


class Walls:
    """What a case is closed in with; made once in the nursery, so that a case opens no file."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.compile_filter = Filter(place.compile_filter or read_filter("compile.bpf"))
        self.run_filter = Filter(place.run_filter or read_filter("run.bpf"))
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.interpreter = ctypes.PyDLL(None)
        self.clone = CLONE[os.uname().machine]
        self.libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4

    def fork_sibling(self) -> int:
        """Returns 0 in a new process and its pid in this one, whose parent is the new one's as well.

        By the system call: os.fork() knows no CLONE_PARENT, and runs hooks that cost a case a third of its time. They
        renew locks and reseed a generator; this process has a single thread, so all locks are free but the
        interpreter's, which PyDLL keeps and the child needs.
        """
        child: int = self.interpreter.syscall(self.clone, CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0)
        if child < 0:
            raise OSError("clone failed")
        return child

    def control(self, option: int, first: int, second: int = 0) -> None:
        if self.libc.prctl(option, first, second, 0, 0):
            raise OSError(ctypes.get_errno(), f"prctl({option})")

    def close(self, *, memory_bytes: int, cpu_s: int) -> None:
        """Closes the calling process in, for good, but for the compiler's looking for files."""
        uid, landlock = self.place.case_uid, self.place.landlock
        if uid is not None:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        for limit, value in (
            (resource.RLIMIT_AS, memory_bytes),
            (resource.RLIMIT_STACK, STACK_BYTES),
            (resource.RLIMIT_CPU, cpu_s),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_NOFILE, 2),
            (resource.RLIMIT_NPROC, 0),
        ):
            resource.setrlimit(limit, (value, value))
        self.control(PR_SET_NO_NEW_PRIVS, 1)
        if landlock >= 0 and self.libc.syscall(LANDLOCK_RESTRICT_SELF, landlock, 0):
            raise OSError(ctypes.get_errno(), "landlock_restrict_self")
        os.closerange(2, 64)
        self.control(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(self.compile_filter))

    def shut(self) -> None:
        """Adds the filter that a program runs under."""
        self.control(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(self.run_filter))


class Pipe:
    """The case's end of its pipes."""

    def __init__(self) -> None:
        self.nonce = bytes(8)

    def read(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(0, size)
            if not part:
                os._exit(0)
            parts.append(part)
            size -= len(part)
        return b"".join(parts) if len(parts) != 1 else parts[0]

    def receive(self) -> bytes:
        """Returns the next question, or b"" when there are no more."""
        header = os.read(0, QUESTION.size)
        if not header:
            return b""
        header += self.read(QUESTION.size - len(header))
        self.nonce, size = QUESTION.unpack(header)
        return self.read(size)

    def answer(self, kind: bytes, payload: bytes) -> None:
        rest = ANSWER.pack(self.nonce, kind, len(payload)) + payload
        while written := os.write(1, rest):
            rest = rest[written:]
            if not rest:
                return

    def send(self, payload: bytes) -> None:
        self.answer(b"M", payload)

    def end(self, outcome: str, detail: str) -> NoReturn:
        text = f"{outcome}\n{detail[:MAX_DETAIL]}"
        self.answer(b"X", text.encode("utf-8", "backslashreplace"))
        os._exit(0)


def describe(error: BaseException) -> str:
    """Returns the exception in one line, with the program's line that raised it."""
    line = 0
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<program>":
            line = step.tb_lineno
        step = step.tb_next
    try:
        words = f"{type(error).__name__}: {error}"
    except BaseException:
        words = "an exception that cannot be printed"
    return f"{words[:MAX_DETAIL]} (line {line})" if line else words


def run_program(
    walls: Walls, pipe: Pipe, tables: dict[str, object], harnesses: dict[str, types.ModuleType]
) -> NoReturn:
    """Loads the program and lets the harness serve it; never returns."""
    # What Python would print for a program (an exception in __del__, say) goes nowhere.
    sys.stdin = sys.stdout = sys.stderr = sys.__stdin__ = sys.__stdout__ = sys.__stderr__ = None
    try:
        start: dict[str, Any] = json.loads(pipe.receive())
        guarded = start["guarded"]
        code, notes = programs.compile_checked(start["program"], entry=start["entry"], guarded=guarded)
        walls.shut()
        function = programs.load(code, tables if guarded else vars(builtins), start["entry"], lock=guarded)
        if not callable(function):
            pipe.end("crash", f"defines no function {start['entry']}")
        pipe.answer(b"R", notes.encode())
        harnesses[start["harness"]].serve(function, pipe.receive, pipe.send)
    except programs.Refused as refused:
        pipe.end(refused.outcome, refused.detail)
    except MemoryError:
        pipe.end("memory", "MemoryError")
    except BaseException as error:
        pipe.end("crash", describe(error))
    os._exit(0)


def load_harness(name: str, source: str) -> types.ModuleType:
    """Returns the harness as a module; used by the supervisor for `judge` and by the nursery for `serve`."""
    module = types.ModuleType(f"harness_{name}")
    exec(compile(source, f"<harness {name}>", "exec", dont_inherit=True), module.__dict__)
    return module


def read_exactly(control: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = control.recv(size - len(parts))
        if not part:
            raise EOFError("the other end of the nursery's socket is gone")
        parts += part
    return bytes(parts)


def nurse(control: socket.socket, place: Place) -> NoReturn:
    """The nursery's life: reads the harnesses, then forks a case for each order until the supervisor is gone."""
    for descriptor, end in enumerate(os.pipe()):  # a pipe to itself instead of /dev/null: there may be no /dev
        os.dup2(end, descriptor)
        os.close(end)
    walls = Walls(place)
    pipe = Pipe()
    programs.seed_random()
    programs.refuse_text_annotations()
    compile_warm()
    tables = programs.make_builtins(lambda what: pipe.end("cheat", what))
    try:
        sources = json.loads(read_exactly(control, int.from_bytes(read_exactly(control, 4), "little")))
    except EOFError:
        os._exit(0)
    harnesses = {name: load_harness(name, source) for name, source in sources.items()}
    gc.collect()
    gc.freeze()
    while True:
        order, pipes, _, _ = socket.recv_fds(control, ORDER.size, 2)
        if len(order) != ORDER.size or len(pipes) != 2:
            os._exit(0)
        child = walls.fork_sibling()
        if not child:
            memory_bytes, cpu_s = ORDER.unpack(order)
            os.dup2(pipes[0], 0)
            os.dup2(pipes[1], 1)
            walls.close(memory_bytes=memory_bytes, cpu_s=cpu_s)
            run_program(walls, pipe, tables, harnesses)
        for descriptor in pipes:
            os.close(descriptor)
        control.send(child.to_bytes(4, "little"))


def compile_warm() -> None:
    """Compiles what makes the compiler import or read something, since a case can open no file."""
    import warnings

    warnings.simplefilter("ignore")
    # The last two need unicodedata, which is a shared library in some Pythons.
    texts = ("'\\d' is 1\nassert (1, 'a')\nf'{1!r:>4}'", "def f(:", "x = 1 +", "\x00", "\uff41 = 1", "'\\N{DIGIT ONE}'")
    for text in texts:
        with contextlib.suppress(programs.Refused):
            programs.compile_checked(text, entry="f", guarded=True)
    "\ud800".encode("utf-8", "backslashreplace")
