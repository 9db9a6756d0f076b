"""Sandboxes that another process keeps, reached through their sockets: for stages in containers, which have no Docker.

keeper.py starts them. Each has a folder, named <slot>-<number>, and in it a socket while it waits for its one caller.
A sandbox is used up when the connection is closed; its successor has a new folder. One process calls at a time.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from stages.sandbox.channel import START_S, Sandbox
from stages.sandbox.protocol import SandboxError

LOOK_EVERY_S = 0.01


class Sockets:
    """The sockets in a folder of folders; each is called once. Any thread may call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        self.called: set[Path] = set()

    def call(self) -> socket.socket:
        """A connection to a sandbox that waits, or the next that will; SandboxError when there is none for long."""
        deadline = time.monotonic() + START_S
        while True:
            for path in self.uncalled():
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    connection.connect(str(path))
                    return connection
                except OSError:  # it ended while it waited, and left its name
                    connection.close()
            if time.monotonic() > deadline:
                raise SandboxError(f"no sandbox has listened in {self.folder} for {START_S:.0f} s")
            time.sleep(LOOK_EVERY_S)

    def uncalled(self) -> list[Path]:
        """At most one socket, from now on counted as called."""
        with self.lock:
            for path in sorted(self.folder.glob("*/socket"), reverse=True):
                if path not in self.called:
                    self.called.add(path)
                    return [path]
        return []


class SocketSandbox(Sandbox):
    """A sandbox behind a socket."""

    def __init__(self, sockets: Sockets, *, harnesses: Mapping[str, str], memory_bytes: int) -> None:
        """Calls one and waits until its supervisor answers; SandboxError when none does."""
        super().__init__(memory_bytes=memory_bytes)
        self.socket = sockets.call()
        self.greet(harnesses)

    def fill(self) -> None:
        assert self.socket is not None
        part = self.socket.recv(1 << 20)
        if not part:
            raise SandboxError("the sandbox ended")
        self.buffer += part

    def discard(self) -> None:
        """Hangs up, which ends the sandbox; never raises."""
        self.hang_up()
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.close()
