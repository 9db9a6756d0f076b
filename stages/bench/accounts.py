"""Whose CPU time it was: this process, the sandboxes' containers, the container daemon.

All figures are seconds since the thing was started: differences of two readings are what counts.
"""

import time
from pathlib import Path
from typing import NamedTuple

from stages.sandbox import SandboxPool
from stages.sandbox.container import Container
from stages.sandbox.image import connect

DAEMONS = ("dockerd", "containerd", "containerd-shim")
TICKS_PER_S = 100  # USER_HZ, which Linux shows to programs on every machine


class Reading(NamedTuple):
    """CPU seconds used so far."""

    process: float
    # this process with all its threads
    containers: float
    # everything in the pool's containers: init, supervisor, nursery, cases
    daemons: float
    # dockerd, containerd and its shims, whoever they work for: exact only where no other containers run

    def since(self, before: "Reading") -> "Reading":
        return Reading(*(now - then for now, then in zip(self, before, strict=True)))


def read(pool: SandboxPool) -> Reading:
    """Returns the CPU used so far; containers that the pool has already replaced are not in it."""
    client = connect()
    try:
        nanoseconds = [
            client.stats(sandbox.id, stream=False, one_shot=True)["cpu_stats"]["cpu_usage"]["total_usage"]
            for sandbox in list(pool.live)
            if isinstance(sandbox, Container)
        ]
    finally:
        client.close()
    return Reading(time.process_time(), sum(nanoseconds) / 1e9, daemon_seconds(Path("/proc")))


def daemon_seconds(processes: Path) -> float:
    """Returns the CPU of the processes called one of DAEMONS; 0 where the daemon is on another machine."""
    ticks = 0
    for folder in processes.glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text()
        except OSError:  # it ended while we looked
            continue
        name, _, rest = text.partition("(")[2].rpartition(")")
        if name.startswith(DAEMONS):
            fields = rest.split()
            ticks += int(fields[11]) + int(fields[12])  # utime and stime of proc(5)
    return ticks / TICKS_PER_S
