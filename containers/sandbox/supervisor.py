"""The supervisor: holds the games, has each program run in a case, and says how the case ended.

Runs as root with SETUID, SETGID and KILL only, on the standard library alone, as the container's one job; without
Docker jail.py puts up other walls and calls main. It reads jobs from its standard input and writes one reply a job to
its standard output, or with `--listen GID` both to the one caller of a socket that the group GID may call:
    message = length (4 bytes, little endian), JSON with a nonce;   reply = the message's nonce (16 bytes), length
    (4), JSON first message {"nonce", "protocol", "harnesses": {name: source}}, then {"nonce", "job"}; replies are
    written by `hello` and `judge_job`
What comes from a case is bytes: they are compared, counted and handed to the harness's judge, and never decide more
than which of the failing outcomes a failure is. The outcome ok is given here, when the judge has finished and the
case has left nothing behind.
"""

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import case as cases

PROTOCOL_VERSION = 1
PR_SET_CHILD_SUBREAPER = 36
MAX_MESSAGE_BYTES = 64 << 20
MAX_REPLY_BYTES = 16 << 20
LEAVE_S = 2.0  # a case without questions exits in under 1 ms; on a busy machine it may wait for a core
SPARE_CPU_S = 5  # how far behind ours the kernel's limit is: more than LEAVE_S, so that ours decides
LOOK_S = 0.03  # three ticks
ADDRESS = re.compile(r"0x[0-9a-f]{4,}", re.IGNORECASE)
MAX_NOTES = 2000
PROBE_SHARE = 0.1  # of the CPU time that the cases took, which the probe may take on top
PROBE_CPU_S = 0.1
CONTAINER = cases.Place()
SOCKETS = "/socket"  # the folder of --listen, a volume's
CLAIMS = ("syntax_error", "foreign_import", "cheat", "crash", "memory")


class CaseEnded(Exception):
    """The program's process ended, or was ended: outcome and detail are final."""

    def __init__(self, outcome: str, detail: str) -> None:
        super().__init__(f"{outcome}: {detail}")
        self.outcome = outcome
        self.detail = detail


class Nursery:
    """The supervisor's end of the nursery."""

    def __init__(self, place: cases.Place) -> None:
        self.place = place
        self.control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.pid = os.fork()
        if not self.pid:
            self.control.close()
            cases.nurse(other, place)
        other.close()
        self.family = place.family if place.family >= 0 else open_family()
        self.listed = self.children()

    def children(self) -> set[bytes]:
        """Returns the supervisor's children as /proc numbers them; none where the kernel keeps no such list."""
        return set(os.pread(self.family, 1 << 16, 0).split()) if self.family >= 0 else set()

    def others(self) -> set[bytes]:
        """Returns the processes there are besides the nursery: a case, and what a case left.

        Whoever loses its parent becomes a child of the supervisor: no child means no process.
        """
        if self.family >= 0:
            return self.children() - self.listed
        return processes_of(self.place.case_uid)

    def teach(self, harnesses: dict[str, str]) -> None:
        text = json.dumps(harnesses).encode()
        self.control.sendall(len(text).to_bytes(4, "little") + text)

    def fork(self, stdin: int, stdout: int, *, memory_bytes: int, cpu_s: int) -> int:
        """Returns the pid of a new case on these descriptors."""
        socket.send_fds(self.control, [cases.ORDER.pack(memory_bytes, cpu_s)], [stdin, stdout])
        return int.from_bytes(cases.read_exactly(self.control, 4), "little")


class Case:
    """One program's process and what is left of its limits."""

    def __init__(self, nursery: Nursery, limits: dict[str, Any]) -> None:
        self.nursery = nursery
        self.cpu_s: float = limits["cpu_s"]
        self.output_left: int = limits["output_bytes"]
        self.ended: CaseEnded | None = None
        self.discard = False
        self.status: int | None = None
        self.used_s = 0.0
        stdin, self.to_case = os.pipe()
        self.from_case, stdout = os.pipe()
        os.set_blocking(self.to_case, False)
        os.set_blocking(self.from_case, False)
        self.pid = nursery.fork(stdin, stdout, memory_bytes=limits["memory_bytes"], cpu_s=int(self.cpu_s) + SPARE_CPU_S)
        os.close(stdin)
        os.close(stdout)
        self.clock = (~self.pid << 3) | 2  # the process's CPU clock, as clock_getcpuclockid(3) numbers it
        self.wall_end = time.monotonic() + limits["wall_s"]
        self.readable = select.poll()
        self.readable.register(self.from_case, select.POLLIN)
        self.writable = select.poll()
        self.writable.register(self.to_case, select.POLLOUT)
        self.writable.register(self.from_case, select.POLLIN)

    def end(self, outcome: str, detail: str) -> CaseEnded:
        """Returns the exception that says so, and keeps the first."""
        if self.ended is None:
            self.ended = CaseEnded(outcome, detail)
        return self.ended

    def cpu_used(self) -> float:
        """Returns the seconds of CPU that the case has used."""
        try:
            return time.clock_gettime(self.clock)
        except OSError:
            return self.used_s

    def wait_for(self, poll: "select.poll") -> None:
        """Returns when the pipe is ready; ends the case when its CPU or wall time is over."""
        while True:
            cpu_left = self.cpu_s - self.cpu_used()
            wall_left = self.wall_end - time.monotonic()
            if cpu_left <= 0:
                self.discard = True
                raise self.end("timeout", f"used its {self.cpu_s:g} s of CPU time")
            if wall_left <= 0:
                self.discard = True
                raise self.end("timeout", "used up its wall time")
            if poll.poll(min(cpu_left, wall_left) * 1000 + 1):
                return

    def ask(self, payload: bytes) -> bytes:
        """Sends one question and returns the answer; raises CaseEnded when there will be none."""
        return self.exchange(payload, b"M")

    __call__ = ask  # a judge is given the case: ask(question), and ask.cpu_used() where it measures speed

    def exchange(self, payload: bytes, kind: bytes) -> bytes:
        if self.ended:
            raise self.ended
        nonce = os.urandom(8)
        self.send(cases.QUESTION.pack(nonce, len(payload)) + payload)
        data = b""
        need = cases.ANSWER.size
        while len(data) < need:
            self.wait_for(self.readable)
            part = os.read(self.from_case, 1 << 16)
            if not part:
                raise self.gone(len(data))
            data = data + part if data else part
            if need == cases.ANSWER.size and len(data) >= need:
                answered, got, size = cases.ANSWER.unpack_from(data)
                if answered != nonce or got not in (kind, b"X"):
                    raise self.end("cheat", "wrote to the supervisor's pipe")
                need += size
                self.output_left -= need
                if self.output_left < 0:
                    raise self.end("output_limit", "answered with too many bytes")
        payload = data[cases.ANSWER.size : need]
        # A claim comes before what follows it: which of the two is read at once is a matter of time.
        claim = self.claimed(payload) if got == b"X" else None
        if len(data) > need and (claim is None or claim.outcome != "cheat"):
            self.ended = None
            raise self.end("cheat", "wrote more than one answer")
        if claim:
            raise claim
        return payload

    def send(self, rest: bytes) -> None:
        while rest:
            try:
                rest = rest[os.write(self.to_case, rest) :]
            except BlockingIOError:
                self.wait_for(self.writable)
                if self.readable.poll(0):
                    part = os.read(self.from_case, 1)
                    raise self.gone(0) if not part else self.end("cheat", "answered before it was asked") from None
            except BrokenPipeError:
                raise self.gone(0) from None

    def claimed(self, payload: bytes) -> CaseEnded:
        """Returns what the case says about its own end: one of the failing outcomes, else a cheat."""
        outcome, _, detail = payload.decode("utf-8", "replace").partition("\n")
        if outcome not in CLAIMS:
            return self.end("cheat", "claimed an outcome that is not its own to claim")
        detail = printable(detail[: cases.MAX_DETAIL + 40])
        detail = ADDRESS.sub("0x...", detail)  # the one thing in it that changes from run to run
        return self.end(outcome, detail)

    def gone(self, num_bytes: int) -> CaseEnded:
        """Returns why the case closed its pipe."""
        self.leave(LEAVE_S)
        if self.status is None:
            self.discard = True
            return self.end("cheat", "closed its pipe and stayed")
        if os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            if number == signal.SIGSYS:
                return self.end("cheat", "used a system call that programs have no need of")
            if number == signal.SIGKILL:
                self.discard = True
                return self.end("memory", "killed by the system for its memory")
            if number == signal.SIGXCPU:
                return self.end("timeout", f"used its {self.cpu_s:g} s of CPU time")
            return self.end("crash", f"ended by {signal.Signals(number).name}")
        return self.end("crash", f"exited with status {os.WEXITSTATUS(self.status)} instead of answering")

    def leave(self, seconds: float) -> None:
        """Waits for the case to exit by itself."""
        if self.status is not None:
            return
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            waiting = select.poll()
            waiting.register(descriptor, select.POLLIN)
            if waiting.poll(seconds * 1000):
                self.reap()
        finally:
            os.close(descriptor)

    def reap(self) -> None:
        """Reaps every child that has ended; notes the case's status and CPU time."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.pid:
                self.status = status
                self.used_s = usage.ru_utime + usage.ru_stime

    def close(self) -> None:
        """Lets the case go: no byte more may come, and no process of it stays."""
        os.close(self.to_case)
        if not self.ended:
            end = time.monotonic() + LEAVE_S
            while not self.ended:
                if not self.readable.poll(max(0.0, end - time.monotonic()) * 1000):
                    self.discard = True
                    self.end("cheat", "stayed when there were no more questions")
                elif os.read(self.from_case, 1):
                    self.end("cheat", "wrote an answer to no question")
                else:
                    self.leave(LEAVE_S)
                    if self.status:
                        self.gone(0)
                    break
        self.sweep()
        os.close(self.from_case)

    def sweep(self) -> None:
        """Kills until no process of the case is left, and reaps."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.leave(LEAVE_S)
        place = self.nursery.place
        for _ in range(1000):
            self.reap()
            others = self.nursery.others()
            if not others:
                return
            if place.sweep == "uid":
                kill_all_of(place)
            elif place.sweep == "namespace":
                self.discard = True  # the nursery dies too
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)
            else:
                for name in others:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(name), signal.SIGKILL)
            time.sleep(0.0002)
        raise RuntimeError("a case's process could not be killed")


def kill_all_of(place: cases.Place) -> None:
    """Kills every process of the case's uid, in one step and as that uid, so that no fork escapes."""
    assert place.case_uid is not None
    os.setresuid(place.sweep_uid, place.case_uid, 0)
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.setresuid(0, 0, 0)


def open_family() -> int:
    """Returns a descriptor of the list of this process's children; -1 where the kernel has none (gVisor's may not)."""
    try:
        return os.open("/proc/thread-self/children", os.O_RDONLY)
    except FileNotFoundError:
        return -1


def processes_of(uid: int | None) -> set[bytes]:
    """Returns the processes of this uid, zombies included."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/status", "rb") as file:
                    text = file.read()
            except (FileNotFoundError, ProcessLookupError):
                continue
            where = text.index(b"\nUid:")
            if str(uid).encode() in text[where : text.index(b"\n", where + 1)].split():
                found.add(name.encode())
    return found


def printable(text: str) -> str:
    """Returns the text with a space for every character that is not one to print."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def probe(harness: Any, given: list[Any], case: Case) -> tuple[dict[str, Any], bool]:
    """Returns what the harness's probe found of a case whose games are over, and whether the probe ended the program.

    What happens here costs little and decides nothing: a program that fails or takes long is spared. Only a cheat is a
    cheat at any time.
    """
    case.cpu_s = min(case.cpu_s, (1 + PROBE_SHARE) * case.cpu_used() + PROBE_CPU_S)
    try:
        return harness.probe(given, case), False
    except CaseEnded as ended:
        return {}, ended.outcome != "cheat"


def busy_ticks(place: cases.Place) -> dict[int, int]:
    """Returns for how many ticks (10 ms) each CPU has not been idle since the machine started."""
    file = place.ticks if place.ticks >= 0 else os.open("/proc/stat", os.O_RDONLY)
    try:
        text = os.pread(file, 1 << 16, 0).decode("ascii")
    finally:
        if file != place.ticks:
            os.close(file)
    ticks = {}
    for line in text.splitlines():
        name, *counts = line.split()
        if name[:3] == "cpu" and name[3:].isdigit():
            ticks[int(name[3:])] = sum(map(int, counts[:8])) - int(counts[3]) - int(counts[4])  # idle, iowait
    return ticks


def quiet_cpu(place: cases.Place) -> int:
    """Returns the CPU that does the least just now, of those that the supervisor may use; any of several alike."""
    before = busy_ticks(place)
    time.sleep(LOOK_S)
    now = busy_ticks(place)
    cpus = os.sched_getaffinity(0)
    return min(cpus, key=lambda cpu: (now.get(cpu, 0) - before.get(cpu, 0), os.urandom(1)))


@contextlib.contextmanager
def on_one_cpu(nursery: Nursery, place: cases.Place) -> Iterator[None]:
    """Keeps the supervisor and the case to come on one CPU: a speed measured on two would be of the CPUs as well.

    Left to itself the kernel keeps all supervisors where they were last, on one CPU in the end.
    """
    before = os.sched_getaffinity(0)
    cpu = quiet_cpu(place)
    try:
        for pid in (0, nursery.pid):
            os.sched_setaffinity(pid, {cpu})
        yield
    finally:
        for pid in (0, nursery.pid):
            os.sched_setaffinity(pid, before)


def judge_job(nursery: Nursery, harnesses: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """Returns the reply to a job, or one with `failed`.

    It has outcome, detail, cases, notes and checks (reported, never scored), cpu_s, supervisor_cpu_s, wall_s, discard.
    """
    started, own_started = time.monotonic(), time.process_time()
    case = Case(nursery, job["limits"])
    harness = harnesses[job["harness"]]
    rows: list[Any] = []
    notes, failed = "", ""
    checks: dict[str, Any] = {}
    spared = False
    try:
        start = {name: job[name] for name in ("program", "entry", "harness", "guarded")}
        notes = printable(case.exchange(json.dumps(start).encode(), b"R")[:MAX_NOTES].decode("ascii", "replace"))
        for row in harness.judge(job["cases"], case):
            rows.append(row)
        if hasattr(harness, "probe") and not case.ended:
            checks, spared = probe(harness, job["cases"], case)
    except CaseEnded as ended:
        case.end(ended.outcome, ended.detail)
    except Exception:
        import traceback  # 3 ms of every cold start, and seldom needed

        failed = traceback.format_exc(limit=-3)
    case.close()
    if failed:
        return {"failed": failed}
    ended = None if spared else case.ended
    return {
        "outcome": ended.outcome if ended else "ok",
        "detail": ended.detail if ended else "",
        "cases": rows,
        "notes": notes,
        "checks": checks,
        "cpu_s": case.used_s,
        "supervisor_cpu_s": time.process_time() - own_started,
        "wall_s": time.monotonic() - started,
        "discard": case.discard,
    }


def read_message() -> dict[str, Any] | None:
    """Returns the next message from outside, None when there will be none."""
    header = read_bytes(4)
    if not header:
        return None
    size = int.from_bytes(header, "little")
    if size > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes")
    message: dict[str, Any] = json.loads(read_bytes(size))
    return message


def read_bytes(size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = os.read(0, min(size - len(parts), 1 << 20))
        if not part:
            return b""
        parts += part
    return bytes(parts)


def write_reply(nonce: str, reply: dict[str, Any]) -> None:
    text = json.dumps(reply, allow_nan=False).encode()
    if len(text) > MAX_REPLY_BYTES:
        text = json.dumps({"failed": f"a reply of {len(text)} bytes"}).encode()
    rest = bytes.fromhex(nonce) + len(text).to_bytes(4, "little") + text
    while rest:
        rest = rest[os.write(1, rest) :]


def listen(folder: str, gid: int) -> bool:
    """Waits for one caller, and has the connection take the place of standard input and output.

    The folder becomes root:gid 2770 and the socket in it 660; a group of its own suffices for that. The socket has its
    name from when it can be called until it is. Returns False when standard input ends first: nobody keeps this one.
    """
    os.chown(folder, -1, gid)
    os.chmod(folder, 0o2770)
    os.umask(0o117)
    path = f"{folder}/socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path + ".new")
        listener.listen(1)
        os.rename(path + ".new", path)
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(listener, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll()}
        if 0 in ready:
            return False
        connection, _ = listener.accept()
        os.unlink(path)
    with connection:
        for descriptor in (0, 1):
            os.dup2(connection.fileno(), descriptor)
    return True


def main(place: cases.Place = CONTAINER, *, group: int | None = None) -> None:
    """Serves jobs until there are no more. group: which one may call the socket; None is standard input and output."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER)")
    nursery = Nursery(place)
    if group is not None and not listen(SOCKETS, group):
        return
    hello = read_message()
    if hello is None:
        return
    harnesses = {name: cases.load_harness(name, source) for name, source in hello["harnesses"].items()}
    for module in harnesses.values():
        module.CaseEnded = CaseEnded
    nursery.teach(hello["harnesses"])
    write_reply(hello["nonce"], {"protocol": PROTOCOL_VERSION, "python": sys.version.split()[0]})
    while (message := read_message()) is not None:
        job = message["job"]
        measures_speed = getattr(harnesses[job["harness"]], "MEASURES_SPEED", False)
        with on_one_cpu(nursery, place) if measures_speed else contextlib.nullcontext():
            reply = judge_job(nursery, harnesses, job)
        write_reply(message["nonce"], reply)


if __name__ == "__main__" and "--warm" not in sys.argv:  # --warm: the image's build has the modules compiled
    main(group=int(sys.argv[2]) if sys.argv[1:2] == ["--listen"] else None)
