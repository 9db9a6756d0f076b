"""Keeps sandboxes listening in a volume, for stages that run in containers and must not reach the Docker daemon.

    volume/<slot>-<number>/socket      folder root:<group> 2770, socket 660

Every sandbox is a container as in container.py, and has nothing of the volume but its own folder. One that ends,
because its caller hung up or because it was killed, has a successor at once. They end with the process that keeps them.
"""

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from stages.config import SandboxConfig
from stages.sandbox.attached import Attached
from stages.sandbox.channel import MAX_STDERR_BYTES
from stages.sandbox.container import host_config
from stages.sandbox.image import connect
from stages.sandbox.pool import LABEL, usable_image

log = logging.getLogger(__name__)

PAUSE_S = 0.5  # before another try where a sandbox does not start or does not last
SHORT_S = 0.3  # a caller keeps one for longer


class Keeper:
    """config.containers sandboxes that listen, each replaced when it ends."""

    def __init__(self, config: SandboxConfig, *, labels: Mapping[str, str], volume: str, group: int) -> None:
        """Starts them in the background; UserError where Docker, image, runtime or volume are missing.

        group: the id of the group that may call them.
        """
        self.config, self.group = config, group
        self.labels = {**labels, LABEL: "1"}
        client = connect()
        try:
            self.image = usable_image(client, config)
            self.root: str = client.inspect_volume(volume)["Mountpoint"]
        finally:
            client.close()
        self.lock = threading.Lock()
        self.ending = threading.Event()
        self.live: set[Attached] = set()
        self.num_started = 0
        self.threads = [
            threading.Thread(target=self.keep, args=(slot,), name=f"keeper-{slot}", daemon=True)
            for slot in range(config.containers)
        ]
        for thread in self.threads:
            thread.start()

    def keep(self, slot: int) -> None:
        """The life of one thread: a sandbox after the other."""
        number = 0
        while not self.ending.is_set():
            started = time.monotonic()
            try:
                sandbox = self.start(f"{self.root}/{slot:04d}-{number:06d}")
            except Exception as error:  # docker's, the network's, a daemon that is restarting
                log.warning("a sandbox container does not start: %s", getattr(error, "message", error))
                self.ending.wait(PAUSE_S)
                continue
            number += 1
            words = self.listen_to(sandbox)
            with self.lock:
                self.live.discard(sandbox)
            sandbox.discard()
            if words and not self.ending.is_set():
                log.warning("a sandbox said: %s", words)
            if time.monotonic() - started < SHORT_S:
                self.ending.wait(PAUSE_S)

    def start(self, folder: str) -> Attached:
        client: Any = connect()
        config = host_config(
            client,
            memory_bytes=self.config.memory_bytes,
            runtime=self.config.runtime,
            folder=folder,
            group=self.group,
        )
        command = ["--listen", str(self.group)]
        sandbox = Attached(
            client, self.image, labels=self.labels, command=command, network_disabled=True, host_config=config
        )
        sandbox.start()
        assert sandbox.socket is not None
        sandbox.socket.settimeout(None)
        with self.lock:
            self.live.add(sandbox)
            self.num_started += 1
            if self.ending.is_set():
                sandbox.hang_up()
        return sandbox

    def listen_to(self, sandbox: Attached) -> str:
        """Waits until the sandbox has ended; returns what it wrote to its standard error."""
        words = bytearray()
        try:
            while (frame := sandbox.frame()) is not None:
                words += frame[1][: MAX_STDERR_BYTES - len(words)]
        except OSError:
            pass
        return words.decode("utf-8", "replace").strip()[-600:]

    def close(self) -> None:
        """Ends every sandbox; returns when they are gone."""
        self.ending.set()
        with self.lock:
            for sandbox in self.live:
                sandbox.hang_up()
        for thread in self.threads:
            thread.join()
