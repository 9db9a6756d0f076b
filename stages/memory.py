"""What there is of the machine's memory. No torch: `flexsink doctor` looks before anything heavy is imported."""

from pathlib import Path

# Limit and use of a container's memory, in control groups of version 2 and 1.
CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def host_bytes() -> int:
    """What the host can give to programs without swapping."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def available_bytes() -> int:
    """What this program may still take of it; in a container, of what that may."""
    free = [host_bytes()]
    for limit, used in CGROUPS:
        try:
            free.append(int(limit.read_text()) - int(used.read_text()))
        except (OSError, ValueError):  # no such version of control groups, or no limit ("max")
            continue
    return max(0, min(free))
