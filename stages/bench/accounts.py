"""Whose CPU time it was: this process, the sandboxes, the container daemon.

All figures are seconds since the thing was started: differences of two readings are what counts.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stages.sandbox import SandboxPool
from stages.sandbox.container import Container
from stages.sandbox.image import connect

PROC = Path("/proc")
DAEMONS = ("dockerd", "containerd", "containerd-shim")
TICKS_PER_S = 100  # USER_HZ, which Linux shows to programs on every machine


class Reading(NamedTuple):
    """CPU seconds used so far."""

    process: float
    # this process with all its threads
    sandboxes: float
    # everything in the pool's sandboxes: init, supervisor, nursery, cases
    daemons: float
    # dockerd, containerd and its shims, whoever they work for: exact only where no other containers run

    def since(self, before: "Reading") -> "Reading":
        return Reading(*(now - then for now, then in zip(self, before, strict=True)))


class Process(NamedTuple):
    """A line of proc(5)'s stat; ticks are user and system time."""

    pid: int
    name: str
    parent: int
    ticks: int
    children_ticks: int
    # of children that have been waited for


def read(pool: SandboxPool) -> Reading:
    """Returns the CPU used so far; sandboxes that the pool has already replaced are not in it."""
    if pool.config.backend != "docker":  # its sandboxes are descendants of this process
        return Reading(time.process_time(), descendants_seconds(PROC, os.getpid()), 0.0)
    client = connect()
    try:
        nanoseconds = [
            client.stats(sandbox.id, stream=False, one_shot=True)["cpu_stats"]["cpu_usage"]["total_usage"]
            for sandbox in list(pool.live)
            if isinstance(sandbox, Container)
        ]
    finally:
        client.close()
    return Reading(time.process_time(), sum(nanoseconds) / 1e9, daemon_seconds(PROC))


def running(processes: Path) -> Iterator[Process]:
    """Yields the processes of a /proc."""
    for folder in processes.glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text()
        except OSError:  # it ended while we looked
            continue
        name, _, rest = text.partition("(")[2].rpartition(")")
        fields = rest.split()
        user, system, children_user, children_system = map(int, fields[11:15])
        yield Process(int(folder.name), name, int(fields[1]), user + system, children_user + children_system)


def daemon_seconds(processes: Path) -> float:
    """Returns the CPU of the processes called one of DAEMONS; 0 where the daemon is on another machine."""
    return sum(process.ticks for process in running(processes) if process.name.startswith(DAEMONS)) / TICKS_PER_S


def descendants_seconds(processes: Path, root: int) -> float:
    """Returns the CPU of all that descends from `root`, itself left out, with what it has waited for."""
    below, found = list(running(processes)), {root}
    while more := {process.pid for process in below if process.parent in found} - found:
        found |= more
    ticks = sum(each.ticks + each.children_ticks for each in below if each.pid in found and each.pid != root)
    return ticks / TICKS_PER_S
