"""The backend docker: one sandbox container, how it is locked in and removed."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from stages.config import UserError
from stages.sandbox.attached import STDOUT, Attached
from stages.sandbox.channel import MAX_STDERR_BYTES, Sandbox
from stages.sandbox.image import FOLDER, connect
from stages.sandbox.protocol import SandboxError

MIB = 1 << 20
OVERHEAD_BYTES = 128 * MIB  # supervisor and nursery 25 MB, the 2048 judge's tables up to 30 MB
AWAY_S = 5.0  # each of a job's tries waits so long for a daemon that is being restarted
POLL_S = 0.3
MAX_PIDS = 12  # init, supervisor, nursery, its go-between, one case
SOCKETS = "/socket"  # where a listening supervisor finds its folder
# What it takes to make a socket and to accept a caller, on top of seccomp.json.
LISTENING = (
    {"action": "SCMP_ACT_ALLOW", "names": ["socket"], "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]},
    {
        "action": "SCMP_ACT_ALLOW",
        "names": [
            *("accept", "accept4", "bind", "getsockname", "getsockopt", "listen"),
            *("chmod", "chown", "fchmodat", "fchownat", "rename", "renameat", "renameat2", "unlink", "unlinkat"),
        ],
    },
)


def host_config(
    client: Any, *, memory_bytes: int, runtime: str, folder: str = "", group: int | None = None
) -> dict[str, Any]:
    """Returns the settings that lock a container in; memory_bytes is what one case may use.

    folder: of this machine, in which the supervisor listens for whoever has the group; neither for one that does not.
    """
    profile = json.loads((FOLDER / "seccomp.json").read_text())
    if folder:
        profile["syscalls"] += LISTENING
    limit = memory_bytes + OVERHEAD_BYTES
    config: dict[str, Any] = client.create_host_config(
        auto_remove=True,
        binds=[f"{folder}:{SOCKETS}"] if folder else None,
        cap_add=["SETUID", "SETGID", "KILL"],
        cap_drop=["ALL"],
        cpu_period=100_000,
        cpu_quota=100_000,
        group_add=[group] if folder else None,
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
        security_opt=["no-new-privileges:true", f"seccomp={json.dumps(profile)}"],
    )
    return config


def patiently(connect: Callable[[], Any]) -> Any:
    """Returns what `connect` returns once the daemon answers; SandboxError when it does not for AWAY_S."""
    deadline = time.monotonic() + AWAY_S
    while True:
        try:
            return connect()
        except UserError as error:
            if time.monotonic() >= deadline:
                raise SandboxError(error.message) from error
            time.sleep(POLL_S)


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
        # A client of its own: those of the docker package keep every connection that they ever opened.
        client = patiently(connect)
        try:
            self.attached = Attached(
                client,
                image,
                labels=labels,
                network_disabled=True,
                host_config=host_config(client, memory_bytes=memory_bytes, runtime=runtime),
            )
            self.attached.start()
        except (docker.errors.DockerException, OSError) as error:
            raise SandboxError(f"a sandbox container does not start: {error}") from error
        self.socket = self.attached.socket
        self.greet(harnesses)

    @property
    def id(self) -> str:
        return self.attached.id

    def fill(self) -> None:
        """Reads one frame of the daemon's stream."""
        frame = self.attached.frame()
        if frame is None:
            raise SandboxError(f"the container ended{self.complaint()}")
        stream, data = frame
        if stream == STDOUT:
            self.buffer += data
        else:
            self.stderr += data[: MAX_STDERR_BYTES - len(self.stderr)]

    def discard(self) -> None:
        """Ends and removes the container; never raises."""
        self.hang_up()
        self.attached.discard()
