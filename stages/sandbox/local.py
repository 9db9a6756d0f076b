"""The backend local: a sandbox of this kernel's own walls, for machines without Docker. Linux only, no root needed.

containers/sandbox/jail.py says what the walls are. find_walls() puts them up once for trial: namespaces where the
kernel lets this user have them, else Landlock and seccomp; UserError when neither stands. LIMITATIONS is what the
backend does not do and Docker does; it is chosen by sandbox.backend=local and never by itself.
"""

import contextlib
import json
import logging
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from stages.config import UserError
from stages.sandbox.channel import MAX_STDERR_BYTES, Sandbox
from stages.sandbox.image import FOLDER
from stages.sandbox.protocol import SandboxError

log = logging.getLogger(__name__)

PROBE_S = 20.0
END_S = 10.0
KINDS = ("namespaces", "landlock")  # in the order in which they are tried
LIMITATIONS = (
    "memory is limited for the program's process (address space) and not for the supervisor's",
    "the CPU is limited by the clock and shared with everything else: there is no quota",
    "the supervisor runs on this machine's Python and standard library, not on an image's",
)
WITHOUT_NAMESPACES = (
    "without namespaces, other processes and the network are there: the filters and Landlock alone keep programs away",
)
ONE_UID = (
    "supervisor and programs have one uid: Landlock, the pid namespace and the filters stand between them, where there "
    "are such",
)


class Walls(NamedTuple):
    """What this machine's sandboxes are made of.

    Example: Walls(kind="namespaces", uids=1, landlock=7, lacking={})
    """

    kind: str
    uids: int  # 3: supervisor, case and sweep apart; 1: one for all
    landlock: int  # the kernel's ABI, 0 without
    lacking: Mapping[str, str]  # kind that was refused -> the kernel's words

    def __str__(self) -> str:
        first = "user, pid, mount, net, ipc and uts namespaces" if self.kind == "namespaces" else "no namespaces"
        uids = "programs under a uid of their own" if self.uids > 1 else "one uid"
        landlock = f"Landlock {self.landlock}" if self.landlock else "no Landlock"
        return f"{first}, {uids}, {landlock}, seccomp"

    def limitations(self) -> tuple[str, ...]:
        """Returns what programs are not kept from, or less firmly than by Docker."""
        words: tuple[str, ...] = LIMITATIONS
        if self.kind != "namespaces":
            words += WITHOUT_NAMESPACES
        return words if self.uids > 1 else words + ONE_UID


def command(kind: str) -> list[str]:
    return [sys.executable, "-P", "-s", "-S", str(FOLDER / "jail.py"), kind]


def environment() -> dict[str, str]:
    """Returns what the supervisor sees of this process's environment: where to find libraries, and a fixed hash."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {**kept, "PYTHONHASHSEED": "0"}


def try_walls(kind: str) -> dict[str, int]:
    """Returns what the jail says of its walls; OSError with the kernel's words when they do not stand."""
    try:
        done = subprocess.run(
            [*command(kind), "--probe"],
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_S,
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"no answer in {PROBE_S:g} s") from None
    try:
        facts: dict[str, int] = json.loads(done.stdout)
    except ValueError:
        raise OSError((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]) from None
    return facts


def find_walls(attempt: Callable[[str], dict[str, int]] = try_walls) -> Walls:
    """Returns the best walls that stand here; UserError, with what the kernel lacks, when none do."""
    if sys.platform != "linux":
        raise UserError(f"sandbox.backend=local needs Linux, not {sys.platform}", "set sandbox.backend=docker")
    lacking: dict[str, str] = {}
    for kind in KINDS:
        try:
            facts = attempt(kind)
        except OSError as error:
            lacking[kind] = str(error)
            continue
        return Walls(kind=kind, uids=facts["uids"], landlock=facts["landlock"], lacking=lacking)
    reasons = "; ".join(f"{kind}: {reason}" for kind, reason in lacking.items())
    raise UserError(
        f"this kernel gives too little for sandbox.backend=local ({reasons})",
        "needed are seccomp filters on x86_64 or aarch64, and either user namespaces (sysctl "
        "user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0) on Linux 5.12 or Landlock on 5.13; "
        "or use sandbox.backend=docker",
    )


class LocalSandbox(Sandbox):
    """A supervisor behind the local walls, and its warden."""

    def __init__(self, *, walls: Walls, harnesses: Mapping[str, str], memory_bytes: int) -> None:
        """Starts both and waits until the supervisor answers; SandboxError when it does not."""
        super().__init__(memory_bytes=memory_bytes)
        self.socket, other = socket.socketpair()
        try:
            self.warden = subprocess.Popen(
                command(walls.kind),
                env=environment(),
                cwd="/",
                stdin=other.fileno(),
                stdout=other.fileno(),
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            self.socket.close()
            raise SandboxError(f"a local sandbox does not start: {error}") from error
        finally:
            other.close()
        self.greet(harnesses)

    def refuse_surplus(self) -> None:
        self.listen()
        super().refuse_surplus()

    def fill(self) -> None:
        assert self.socket is not None
        part = self.socket.recv(1 << 20)
        if not part:
            self.listen(END_S)
            raise SandboxError(f"the sandbox ended{self.complaint()}")
        self.buffer += part

    def listen(self, seconds: float = 0.0) -> None:
        """Notes what came on standard error."""
        assert self.warden.stderr is not None
        poll = select.poll()
        poll.register(self.warden.stderr, select.POLLIN)
        while poll.poll(seconds * 1000):
            part = os.read(self.warden.stderr.fileno(), 1 << 16)
            self.stderr += part[: MAX_STDERR_BYTES - len(self.stderr)]
            if not part:
                return

    def discard(self) -> None:
        """Ends supervisor and cases; never raises."""
        self.hang_up()
        try:
            self.warden.wait(END_S)
        except subprocess.TimeoutExpired:
            self.warden.kill()  # the kernel kills what depends on it
            self.warden.wait()
        with contextlib.suppress(OSError):
            assert self.warden.stderr is not None
            self.warden.stderr.close()
        if self.socket is not None:
            self.socket.close()
