"""One sandbox container: how it is locked in, the one socket to its supervisor, and one reply a job.

Not thread-safe: a container belongs to one thread of the pool. A container in doubt (a byte too many, a reply too
late, a broken frame) is not repaired: SandboxError is raised and the caller discards it.
"""

import contextlib
import json
import os
import select
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

from stages.config import UserError
from stages.sandbox.image import FOLDER, connect
from stages.sandbox.protocol import PROTOCOL_VERSION, Job, Outcome, Result, SandboxError

MIB = 1 << 20
OVERHEAD_BYTES = 128 * MIB  # supervisor and nursery 25 MB, the 2048 judge's tables up to 30 MB
MAX_PIDS = 12  # init, supervisor, nursery, its go-between, one case
START_S = 30.0  # cold containers take 0.2-0.4 s
REMOVE_S = 10.0
REPLY_GRACE_S = 15.0  # past the job's own wall time
MAX_REPLY_BYTES = 16 * MIB
MAX_STDERR_BYTES = 8192
STREAM_HEADER = struct.Struct(">BxxxL")  # the daemon's frame around output: stream (1 stdout, 2 stderr), length
STDOUT = 1


def host_config(client: Any, *, memory_bytes: int, runtime: str) -> dict[str, Any]:
    """Returns the settings that lock a container in; memory_bytes is what one case may use."""
    limit = memory_bytes + OVERHEAD_BYTES
    config: dict[str, Any] = client.create_host_config(
        auto_remove=True,
        cap_add=["SETUID", "SETGID", "KILL"],
        cap_drop=["ALL"],
        cpu_period=100_000,
        cpu_quota=100_000,
        init=True,
        ipc_mode="none",
        log_config={"Type": "none"},
        mem_limit=limit,
        memswap_limit=limit,
        network_mode="none",
        oom_score_adj=500,
        pids_limit=MAX_PIDS,
        read_only=True,
        runtime=runtime or None,
        security_opt=["no-new-privileges:true", f"seccomp={(FOLDER / 'seccomp.json').read_text()}"],
    )
    return config


def remove(client: Any, container: str) -> None:
    """Removes a container and waits until it is gone. Never raises: daemon and container may be gone already."""
    import docker

    deadline = time.monotonic() + REMOVE_S
    while time.monotonic() < deadline:
        try:
            client.remove_container(container, force=True, v=True)
        except docker.errors.NotFound:
            return
        except docker.errors.APIError:
            time.sleep(0.05)  # the daemon is at it already: their pipe closed, or another thread asked
        except (docker.errors.DockerException, OSError):
            return


class Container:
    """A running supervisor that knows the harnesses."""

    def __init__(
        self,
        *,
        image: str,
        harnesses: Mapping[str, str],
        labels: Mapping[str, str],
        memory_bytes: int,
        runtime: str = "",
    ) -> None:
        """Starts a container and waits until its supervisor answers; SandboxError when it does not."""
        import docker

        self.buffer = bytearray()
        self.stderr = bytearray()
        self.num_jobs = 0
        self.memory_bytes = memory_bytes
        self.id = ""
        self.socket: socket.socket | None = None
        try:
            # A client of its own: those of the docker package keep every connection that they ever opened.
            client = self.client = connect()
        except UserError as error:
            raise SandboxError(error.message) from error
        try:
            created = client.create_container(
                image,
                stdin_open=True,
                network_disabled=True,
                labels=dict(labels),
                host_config=host_config(client, memory_bytes=memory_bytes, runtime=runtime),
            )
            self.id = created["Id"]
            self.stream = client.attach_socket(self.id, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            self.socket = getattr(self.stream, "_sock", self.stream)
            client.start(self.id)
        except (docker.errors.DockerException, OSError) as error:
            self.discard()
            raise SandboxError(f"a sandbox container does not start: {error}") from error
        try:
            hello = self.exchange({"protocol": PROTOCOL_VERSION, "harnesses": dict(harnesses)}, START_S)
            if hello.get("protocol") != PROTOCOL_VERSION:
                raise SandboxError(f"the supervisor speaks protocol {hello.get('protocol')}, not {PROTOCOL_VERSION}")
        except SandboxError:
            self.discard()
            raise

    def judge(self, job: Job) -> tuple[Result, bool]:
        """Returns the verdict and whether the container may be used again; SandboxError when there is none to trust."""
        if job.limits.memory_bytes > self.memory_bytes:
            raise ValueError(
                f"job {job.job_id} may use {job.limits.memory_bytes} bytes, its container {self.memory_bytes}"
            )
        self.num_jobs += 1
        reply = self.exchange({"job": job.to_message()}, job.limits.wall_s + REPLY_GRACE_S)
        if "failed" in reply:
            raise SandboxError(f"the judge of {job.harness} failed on job {job.job_id}: {reply['failed']}")
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

    def fill(self) -> None:
        """Reads one frame of the daemon's stream."""
        stream, size = STREAM_HEADER.unpack(self.receive(STREAM_HEADER.size))
        data = self.receive(size)
        if stream == STDOUT:
            self.buffer += data
        else:
            self.stderr += data[: MAX_STDERR_BYTES - len(self.stderr)]

    def receive(self, size: int) -> bytes:
        assert self.socket is not None
        parts = bytearray()
        while len(parts) < size:
            part = self.socket.recv(min(size - len(parts), MIB))
            if not part:
                raise SandboxError(f"the container ended{self.complaint()}")
            parts += part
        return bytes(parts)

    def complaint(self) -> str:
        """Returns what the supervisor wrote to its standard error, in brackets."""
        words = self.stderr.decode("utf-8", "replace").strip()
        return f" ({words[-600:]})" if words else ""

    def hang_up(self) -> None:
        """Closes the connection, which ends the supervisor and whoever waits for its reply; any thread may call it."""
        if self.socket is not None:
            with contextlib.suppress(OSError):  # gone already
                self.socket.shutdown(socket.SHUT_RDWR)

    def discard(self) -> None:
        """Ends and removes the container; never raises."""
        self.hang_up()
        if self.socket is not None:
            # The client's stream and its socket share the descriptor, which stays open until both are closed.
            with contextlib.suppress(OSError):
                self.stream.close()
                self.socket.close()
        if self.id:
            remove(self.client, self.id)
        self.client.close()
