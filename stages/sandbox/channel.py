"""What every backend's sandbox has in common: one socket to a supervisor, one reply a job.

Not thread-safe: a sandbox belongs to one thread of the pool. A sandbox in doubt (a byte too many, a reply too late, a
broken frame) is not repaired: SandboxError is raised and the caller discards it.
"""

import contextlib
import json
import logging
import os
import select
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from stages.sandbox.protocol import KEPT, PROTOCOL_VERSION, Job, Outcome, Result, SandboxError

log = logging.getLogger(__name__)

START_S = 30.0  # cold ones take 0.1-0.4 s
REPLY_GRACE_S = 15.0  # past the job's own wall time
MAX_REPLY_BYTES = 16 << 20
MAX_STDERR_BYTES = 8192


class Sandbox(ABC):
    """A supervisor that knows the harnesses: judge() until the reply says otherwise, then discard().

    A backend sets `socket` and starts the supervisor in __init__, then calls greet(); it brings fill() and discard().
    """

    def __init__(self, *, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.num_jobs = 0
        self.buffer = bytearray()
        self.stderr = bytearray()
        self.socket: socket.socket | None = None

    @abstractmethod
    def fill(self) -> None:
        """Adds to `buffer` what the supervisor wrote, at least a byte of it or of `stderr`; waits for that."""

    @abstractmethod
    def discard(self) -> None:
        """Ends the sandbox and whatever runs in it; never raises."""

    def greet(self, harnesses: Mapping[str, str]) -> None:
        """Teaches the supervisor the harnesses; SandboxError, and no sandbox is left, when it does not answer."""
        try:
            hello = self.exchange({"protocol": PROTOCOL_VERSION, "harnesses": dict(harnesses)}, START_S)
            if hello.get("protocol") != PROTOCOL_VERSION:
                raise SandboxError(f"the supervisor speaks protocol {hello.get('protocol')}, not {PROTOCOL_VERSION}")
        except SandboxError:
            self.discard()
            raise

    def judge(self, job: Job) -> tuple[Result, bool]:
        """Returns the verdict and whether the sandbox may be used again; SandboxError when there is none to trust."""
        if job.limits.memory_bytes > self.memory_bytes:
            raise ValueError(
                f"job {job.job_id} may use {job.limits.memory_bytes} bytes, its sandbox {self.memory_bytes}"
            )
        self.num_jobs += 1
        reply = self.exchange({"job": job.to_message()}, job.limits.wall_s + REPLY_GRACE_S)
        if "failed" in reply:
            trace = str(reply["failed"]).strip()
            log.error("the judge of %s failed on job %s: %s", job.harness, job.job_id, trace)
            raise SandboxError(
                f"the judge of {job.harness} failed on job {job.job_id}: {trace.splitlines()[-1] if trace else '?'}",
                f"mend judge in the task's harness, the run's log has the whole traceback; {KEPT}",
            )
        try:
            result = Result(
                job_id=job.job_id,
                outcome=Outcome(reply["outcome"]),
                detail=reply["detail"],
                cases=tuple(reply["cases"]),
                notes=reply["notes"],
                checks=reply["checks"],
                cpu_s=reply["cpu_s"],
                supervisor_cpu_s=reply["supervisor_cpu_s"],
                wall_s=reply["wall_s"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SandboxError(f"a reply that is none: {error!r}") from error
        return result, not reply["discard"]

    def exchange(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Sends one message and returns the reply that bears its nonce, which must be all that comes."""
        nonce = os.urandom(16)
        text = json.dumps({**message, "nonce": nonce.hex()}, allow_nan=False).encode()
        deadline = time.monotonic() + seconds
        self.refuse_surplus()
        assert self.socket is not None
        try:
            self.socket.settimeout(seconds)
            self.socket.sendall(len(text).to_bytes(4, "little") + text)
            header = self.read(20, deadline)
            if header[:16] != nonce:
                raise SandboxError("a reply without its message's nonce")
            size = int.from_bytes(header[16:], "little")
            if size > MAX_REPLY_BYTES:
                raise SandboxError(f"a reply of {size} bytes")
            payload = self.read(size, deadline)
        except TimeoutError:
            raise SandboxError(f"no reply from the supervisor in {seconds:.0f} s") from None
        except OSError as error:
            raise SandboxError(f"the supervisor's socket broke: {error}") from error
        self.refuse_surplus()
        try:
            reply: dict[str, Any] = json.loads(payload)
        except ValueError as error:
            raise SandboxError(f"a reply that is not JSON: {error}") from error
        return reply

    def refuse_surplus(self) -> None:
        """Raises SandboxError when there is a byte that nobody asked for."""
        assert self.socket is not None
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        if not self.buffer and poll.poll(0):
            self.fill()
        if self.buffer or self.stderr:
            raise SandboxError(f"{len(self.buffer)} bytes too many from the supervisor{self.complaint()}")

    def read(self, size: int, deadline: float) -> bytes:
        """Returns the supervisor's next `size` bytes."""
        assert self.socket is not None
        while len(self.buffer) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.socket.settimeout(left)
            self.fill()
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    def complaint(self) -> str:
        """Returns what the supervisor wrote to its standard error, in brackets."""
        words = self.stderr.decode("utf-8", "replace").strip()
        return f" ({words[-600:]})" if words else ""

    def hang_up(self) -> None:
        """Closes the connection, which ends the supervisor and whoever waits for its reply; any thread may call it."""
        if self.socket is not None:
            with contextlib.suppress(OSError):  # gone already
                self.socket.shutdown(socket.SHUT_RDWR)
