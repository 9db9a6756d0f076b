"""The attacks that any sandbox backend must survive, as data; self_check.py runs them.

Programs define `pick(numbers: list[int]) -> int`, the index of the largest of 8 numbers; the judge counts the rounds
answered right. An attack names the outcomes that may come of it. Those with guarded=False skip the static check and
the chosen builtins: they have the interpreter from the start, and attack the process, the pipe and the container
below it.
"""

from dataclasses import dataclass

from stages.sandbox.protocol import Outcome

HONEST = "def pick(numbers):\n    return numbers.index(max(numbers))\n"
WRONG = "def pick(numbers):\n    return numbers.index(min(numbers))\n"
SECRET = "the judge alone knows this"
MASK = 0x5A  # hides the secret from a search that would find it in the program's own text


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One hostile program. right: rounds it may get right when its outcome is ok."""

    name: str
    program: str
    expected: tuple[Outcome, ...]
    guarded: bool = True
    right: int = 0


def inside(body: str) -> str:
    """Returns a program whose pick() runs `body` and then answers wrong."""
    lines = "\n".join("    " + line for line in body.splitlines())
    return f"def pick(numbers):\n{lines}\n    return numbers.index(min(numbers))\n"


def outer(name: str, program: str, *expected: Outcome, right: int = 0) -> Attack:
    return Attack(name=name, program=program, expected=expected, right=right)


def inner(name: str, program: str, *expected: Outcome, right: int = 0) -> Attack:
    return Attack(name=name, program=program, expected=expected, guarded=False, right=right)


CHEAT, CRASH, TIMEOUT, MEMORY = Outcome.cheat, Outcome.crash, Outcome.timeout, Outcome.memory
SYNTAX, FOREIGN, OUTPUT, OK = Outcome.syntax_error, Outcome.foreign_import, Outcome.output_limit, Outcome.ok

LIBC = "import ctypes\nlibc = ctypes.CDLL(None)\n"

NAMES = (
    outer("reads a file", inside("open('/etc/passwd').read()"), CHEAT),
    outer("writes a file", inside("open('/tmp/x', 'w').write('x')"), CHEAT),
    outer("imports os", "import os\n" + HONEST, FOREIGN),
    outer("imports a network module inside the function", inside("from socket import socket"), FOREIGN),
    outer("imports importlib", inside("import importlib\nimportlib.import_module('os')"), FOREIGN),
    outer("imports a submodule of nothing allowed", "import os.path as math\n" + HONEST, FOREIGN),
    outer("imports relatively", "from . import case\n" + HONEST, FOREIGN),
    outer("calls __import__", inside("__import__('os').system('id')"), CHEAT),
    outer("calls eval", inside("eval('1')"), CHEAT),
    outer("calls exec at definition", "@exec\ndef pick(numbers):\n    return 0\n", CHEAT),
    outer("opens a file in a default argument", "def pick(numbers, file=open('/etc/passwd')):\n    return 0\n", CHEAT),
    outer("walks __subclasses__", inside("().__class__.__base__.__subclasses__()"), CHEAT),
    outer("reaches builtins through __globals__", inside("pick.__globals__['__builtins__']"), CHEAT),
    outer("names __builtins__", inside("__builtins__['open']"), CHEAT),
    outer("reads a generator's frame", inside("(n for n in numbers).gi_frame.f_back"), CHEAT),
    outer("reads a traceback's frame", inside("try:\n    1 / 0\nexcept Exception as e:\n    e.__traceback__"), CHEAT),
    outer("spells a dunder at run time", inside("getattr((), '__cl' + 'ass__')"), CHEAT),
    outer("spells a dunder by reduce", inside("import functools\nfunctools.reduce(getattr, ['__class__'], ())"), CHEAT),
    outer(
        "hides an attribute's name in a str subclass",
        "class Name(str):\n    def startswith(self, *a):\n        return False\n"
        + inside("getattr((), Name('__class__'))"),
        CRASH,
    ),
    outer("spells a dunder in full-width letters", inside("().__\uff43lass__"), CHEAT),
    outer(
        "evaluates a forward reference",
        inside("import typing\ntyping.ForwardRef('1')._evaluate({}, {}, frozenset())"),
        CRASH,
    ),
    outer("captures a dunder by matching", inside("match {}:\n    case {**__builtins__}:\n        pass"), CHEAT),
    outer(
        "catches an exception as a dunder",
        inside("try:\n    1 / 0\nexcept Exception as __builtins__:\n    pass"),
        CHEAT,
    ),
    outer("unwraps the guarded getattr", inside("getattr(getattr, '__wrapped__')"), CHEAT),
    outer("imports by a name in the builtins' clothes", inside("from random import __builtins__"), CHEAT),
    outer("matches a dunder", inside("match numbers:\n    case object(__class__=kind):\n        kind.mro()"), CHEAT),
    outer("sets __match_args__", "class A:\n    __match_args__ = ('__class__',)\n" + HONEST, CHEAT),
    outer("walks by format()", inside("'{0.__class__.__base__}'.format(numbers)"), OK),
    outer("evaluates annotations", inside("import typing\ntyping.get_type_hints(pick)"), CRASH),
    outer("takes a module from a module", inside("import random\nrandom._os.system('id')"), CRASH),
    outer("raises SystemExit", inside("raise SystemExit(0)"), CRASH),
    outer("calls exit", inside("exit(0)"), CRASH),
    outer("patches random", "import random\nrandom.random = lambda: 0\nrandom.seed = None\n" + HONEST, OK, right=8),
    outer("defines no function", "pick = 3\n", CRASH),
)

RESOURCES = (
    outer("loops for ever", inside("while True:\n    pass"), TIMEOUT),
    outer("loops at definition", "while True:\n    pass\n", TIMEOUT),
    outer(
        "swallows every exception in a loop",
        inside("while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass"),
        TIMEOUT,
    ),
    outer("loops inside C", inside("sum(range(10 ** 13))"), TIMEOUT),
    outer("makes a huge power", inside("10 ** 10 ** 9"), TIMEOUT, MEMORY),
    outer("makes a huge number", inside("1 << 10 ** 11"), MEMORY),
    outer("makes a huge list", inside("[0] * 10 ** 10"), MEMORY),
    outer("doubles a string for ever", inside("x = 'x'\nwhile True:\n    x += x"), MEMORY),
    outer("grows a list for ever", inside("x = []\nwhile True:\n    x.append(' ' * 1000)"), MEMORY),
    outer(
        "swallows MemoryError for ever",
        inside("x = []\nwhile True:\n    try:\n        x.append(' ' * 10 ** 6)\n    except MemoryError:\n        pass"),
        TIMEOUT,
    ),
    outer("recurses for ever", inside("pick(numbers)"), CRASH),
    outer("nests brackets", "x = " + "(" * 5000 + ")" * 5000 + "\n", SYNTAX, MEMORY),
    outer("nests operators", "x = " + "-" * 100_000 + "1\n" + HONEST, SYNTAX, MEMORY, CRASH),
    outer("nests blocks", "".join(" " * n + "if 1:\n" for n in range(200)) + " " * 200 + "x = 1\n", SYNTAX),
    outer("is 10 MB long", "# " + "x" * (10 << 20) + "\n" + HONEST, OUTPUT),
    outer("holds a null byte", "x = '\0'\n" + HONEST, SYNTAX),
    outer("holds a lone surrogate", "x = '\ud800'\n" + HONEST, SYNTAX),
    outer("prints without end", inside("for _ in range(1000):\n    print('x' * 1000)"), OK),
    outer("returns 100 MB", "def pick(numbers):\n    return 'x' * 10 ** 8\n", OUTPUT, MEMORY),
    outer("returns None", "def pick(numbers):\n    return None\n", OK),
    outer(
        "returns what raises when it is written",
        "class A:\n    def __str__(self):\n        1 / 0\npick = lambda n: A()\n",
        CRASH,
    ),
    outer(
        "returns a str that lies",
        "class A(str):\n    def __eq__(self, other):\n        return True\npick = lambda n: A('9')\n",
        OK,
    ),
    outer("changes its argument", inside("numbers[:] = [9, 0, 0, 0, 0, 0, 0, 0]\nreturn 0"), OK, right=1),
    outer(
        "leaves a __del__ that loops",
        "class A:\n    def __del__(self):\n        while True: pass\na = A()\n" + HONEST,
        OK,
        right=8,
    ),
    outer(
        "raises in __str__",
        "class E(Exception):\n    def __str__(self):\n        raise self\n" + inside("raise E"),
        CRASH,
    ),
)

PROCESS = (
    inner("opens a file", inside("open('/etc/passwd').read()"), CHEAT),
    inner("lists /proc", inside("import os\nos.listdir('/proc')"), CHEAT),
    inner("opens its own memory", inside("import os\nos.open('/proc/self/mem', 2)"), CHEAT),
    inner("runs a command", inside("import os\nos.system('id')"), CHEAT),
    inner("is a fork bomb", inside("import os\nwhile True:\n    os.fork()"), CHEAT),
    inner(
        "forks and lives in a new session",
        inside("import os\nif not os.fork():\n    os.setsid()\n    while True: pass"),
        CHEAT,
    ),
    inner("starts a thread", inside("import _thread\n_thread.start_new_thread(print, ())"), CHEAT),
    inner("opens a socket", inside("import socket\nsocket.socket()"), CHEAT),
    inner("kills everything", inside("import os\nos.kill(-1, 9)"), CHEAT),
    inner("kills its parent", inside("import os\nos.kill(os.getppid(), 9)"), CHEAT),
    inner("catches signals", inside("import signal\nsignal.signal(15, signal.SIG_IGN)"), CHEAT),
    inner("sleeps", inside("import time\ntime.sleep(3600)"), CHEAT),
    inner("aborts", inside("import os\nos.abort()"), CHEAT, CRASH),
    inner(
        "locks a futex by priority",
        inside(LIBC + "libc.syscall(202, libc.mmap(0, 4096, 3, 34, -1, 0), 6, 0, 0, 0, 0)"),
        CHEAT,
    ),
    inner(
        "waits on a futex for ever",
        inside("import _thread\nlock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()"),
        TIMEOUT,
    ),
    inner(
        "writes over libc",
        inside(
            LIBC
            + "page = ctypes.cast(libc.getpid, ctypes.c_void_p).value & ~4095\n"
            + "libc.mprotect(ctypes.c_void_p(page), 4096, 3)\nctypes.memset(page, 0xc3, 4096)"
        ),
        OK,
        CRASH,
    ),
    inner("raises its limits", inside("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))"), CHEAT),
    inner("becomes another user", inside("import os\nos.setuid(0)"), CHEAT),
    inner("duplicates its pipe", inside("import os\nos.dup2(1, 5)"), CHEAT),
    inner("closes its pipe", inside("import os\nos.close(1)"), CHEAT),
    inner("reads from other descriptors", inside("import os\nos.read(3, 9)"), CHEAT),
    inner("writes to standard error", inside("import os\nos.write(2, b'x')"), CHEAT),
    inner("makes shared memory", inside(LIBC + "libc.shmget(1, 4096, 0o1777)"), CHEAT),
    inner("asks for io_uring", inside(LIBC + "libc.syscall(425, 8, 0)"), CHEAT),
    inner("asks for ptrace", inside(LIBC + "libc.ptrace(0, 0, 0, 0)"), CHEAT),
    inner("asks for prctl", inside(LIBC + "libc.prctl(22, 0, 0, 0, 0)"), CHEAT),
    inner("asks for a 32-bit system call number", inside(LIBC + "libc.syscall(0x40000000 + 39)"), CHEAT),
    inner("makes executable memory", inside("import mmap\nmmap.mmap(-1, 4096, prot=7)"), CHEAT),
    inner("makes executable memory with ctypes", inside(LIBC + "libc.mmap(0, 4096, 7, 34, -1, 0)"), CHEAT),
    inner("reads address 0", inside("import ctypes\nctypes.string_at(0)"), CRASH),
    inner(
        "overflows the stack",
        inside("import sys\nsys.setrecursionlimit(10 ** 9)\nf = lambda x: list(map(f, [x]))\nf(1)"),
        CRASH,
        MEMORY,
    ),
    inner("exits with status 0", inside("import os\nos._exit(0)"), CRASH),
    inner("patches time", inside("import time\ntime.monotonic = time.time = time.process_time = lambda: 0"), OK),
    inner("patches the way out", "import os\ndef stay(code):\n    while True: pass\nos._exit = stay\n" + WRONG, CHEAT),
    inner(
        "maps memory without end",
        inside(LIBC + "while libc.mmap(0, 1 << 24, 3, 34, -1, 0) != -1: pass\n[0] * 10 ** 8"),
        MEMORY,
    ),
)

# A forged frame is nonce, kind, length, payload: with the last nonce, with none, before and after the question.
FRAME = (
    "import os, struct\ndef frame(nonce, kind, text):\n    return nonce + kind + struct.pack('<I', len(text)) + text\n"
)
PIPE = (
    "import sys\ndef find_pipe():\n    frame = sys._getframe()\n    while 'pipe' not in frame.f_locals:\n"
    "        frame = frame.f_back\n    return frame.f_locals['pipe']\n"
)
# Reads every block that Python's allocator handed out and the end of the C heap. It answers right when it finds it, and
# fails when it does not even find what it has just made itself.
SEARCH = f"""
import ctypes, gc
MASKED = {bytes(letter ^ MASK for letter in SECRET.encode())!r}
def pick(numbers):
    control = b"made by " + b"the program" * 2
    libc = ctypes.CDLL(None)
    libc.sbrk.restype = ctypes.c_size_t
    things = gc.get_objects()
    things += [text for thing in things if type(thing) is dict for text in (*thing.keys(), *thing.values())]
    blocks = {{id(thing) & ~0x3fff for thing in things}} | {{id(control) & ~0x3fff}}
    blocks = [block for block in blocks if block > 1 << 40]
    memory = b"".join(ctypes.string_at(block, 1 << 14) for block in blocks)
    memory += ctypes.string_at(libc.sbrk(0) - (1 << 19), 1 << 19)
    if control not in memory:
        raise LookupError("the search does not work")
    found = bytes(letter ^ {MASK} for letter in MASKED) in memory
    return numbers.index(max(numbers) if found else min(numbers))
"""
CHANNEL = (
    inner("floods its pipe", inside("import os\nwhile True:\n    os.write(1, b'x' * 65536)"), CHEAT),
    inner("writes one byte too many", inside("import os\nos.write(1, b'x')"), CHEAT),
    inner(
        "claims the outcome ok",
        FRAME + PIPE + inside("os.write(1, frame(find_pipe().nonce, b'X', b'ok\\nwon'))"),
        CHEAT,
    ),
    inner(
        "claims a timeout", FRAME + PIPE + inside("os.write(1, frame(find_pipe().nonce, b'X', b'timeout\\n'))"), CHEAT
    ),
    inner(
        "claims a crash and goes on",
        FRAME + PIPE + inside("os.write(1, frame(find_pipe().nonce, b'X', b'crash\\n'))"),
        CRASH,
        CHEAT,
    ),
    inner("answers twice", FRAME + PIPE + inside("os.write(1, frame(find_pipe().nonce, b'M', b'7'))"), CHEAT),
    inner("answers with its own send", PIPE + inside("find_pipe().send(b'7')"), CHEAT),
    inner("answers before it is asked", FRAME + "os.write(1, frame(bytes(8), b'M', b'7') * 8)\n" + WRONG, CHEAT),
    inner("says that it is ready twice", PIPE + "find_pipe().answer(b'R', b'')\n" + WRONG, CHEAT),
    inner("announces 4 GB", inside("import os\nos.write(1, b'x' * 9 + b'\\xff' * 4)"), CHEAT),
    inner(
        "announces 4 GB under its nonce",
        PIPE + inside("import os\nos.write(1, find_pipe().nonce + b'M' + b'\\xff' * 4)"),
        OUTPUT,
    ),
    inner(
        "answers with half a frame",
        PIPE + inside("import os\nos.write(1, find_pipe().nonce)\nwhile True: pass"),
        TIMEOUT,
    ),
    inner("waits for a question that is not due", inside("import os\nos.read(0, 1)"), TIMEOUT),
    inner(
        "serves itself to the end",
        FRAME
        + """
def pick(numbers):
    import os, struct
    nonce = find_pipe().nonce
    while True:
        os.write(1, frame(nonce, b'M', b'8'))
        question = os.read(0, 65536)
        if not question:
            os._exit(0)
        nonce = question[:8]
"""
        + PIPE,
        OK,
    ),
    inner("searches its memory for the judge's secret", SEARCH, OK),
)

ATTACKS: tuple[Attack, ...] = NAMES + RESOURCES + PROCESS + CHANNEL
