"""The backend docker: one sandbox container, how it is locked in and removed."""

import contextlib
import struct
import time
from collections.abc import Mapping
from typing import Any

from stages.config import UserError
from stages.sandbox.channel import MAX_STDERR_BYTES, Sandbox
from stages.sandbox.image import FOLDER, connect
from stages.sandbox.protocol import SandboxError

MIB = 1 << 20
OVERHEAD_BYTES = 128 * MIB  # supervisor and nursery 25 MB, the 2048 judge's tables up to 30 MB
MAX_PIDS = 12  # init, supervisor, nursery, its go-between, one case
REMOVE_S = 10.0
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


class Container(Sandbox):
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

        super().__init__(memory_bytes=memory_bytes)
        self.id = ""
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
        self.greet(harnesses)

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
