"""A running container and the connection to its standard streams: for sandboxes, and for what stages run in.

Not thread-safe but for hang_up(). Whoever reads its standard input in the container learns from its end that the
process which started the container is gone, killed or not.
"""

import contextlib
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

REMOVE_S = 60.0  # how long the daemon may take to remove something that others may be removing, too
MIB = 1 << 20
STREAM_HEADER = struct.Struct(">BxxxL")  # the daemon's frame around output: stream (1 stdout, 2 stderr), length
STDOUT = 1


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


class Attached:
    """A container, its standard input open until this process closes it or ends."""

    def __init__(self, client: Any, image: str, *, labels: Mapping[str, str], **options: Any) -> None:
        """Creates and attaches; the client is the container's own from here on.

        options: as of docker.APIClient.create_container. Errors: docker's own and OSError; nothing is left then.
        """
        import docker

        self.client, self.id = client, ""
        self.stream: Any = None
        self.socket: socket.socket | None = None
        try:
            self.id = client.create_container(image, stdin_open=True, labels=dict(labels), **options)["Id"]
            self.stream = client.attach_socket(self.id, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            self.socket = getattr(self.stream, "_sock", self.stream)
        except (docker.errors.DockerException, OSError):
            self.discard()
            raise

    def start(self) -> None:
        """Starts it. Errors as of the constructor."""
        import docker

        try:
            self.client.start(self.id)
        except (docker.errors.DockerException, OSError):
            self.discard()
            raise

    def frame(self) -> tuple[int, bytes] | None:
        """The next piece of output and its stream, None when the container has ended; waits as the socket is set."""
        header = self.receive(STREAM_HEADER.size)
        if header is None:
            return None
        stream, size = STREAM_HEADER.unpack(header)
        data = self.receive(size)
        return None if data is None else (stream, data)

    def receive(self, size: int) -> bytes | None:
        assert self.socket is not None
        parts = bytearray()
        while len(parts) < size:
            part = self.socket.recv(min(size - len(parts), MIB))
            if not part:
                return None
            parts += part
        return bytes(parts)

    def hang_up(self) -> None:
        """Ends the container's standard input; any thread may call it."""
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
