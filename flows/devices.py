"""The lock that keeps two runs from sharing a GPU: one file a device, named after it, locked while a run is at work.

`steps.lock` says which: "gpu" is the first GPU this process sees (none on a machine without), "none" lets the run share
it, any other word is a name of your own, such as "cpu", that one run at a time holds. The lock is a flock: however a
run ends, kill -9 included, it is released. The files lie in FLEXSINK_LOCKS, by default one folder for the whole
machine; workers in containers must mount that folder. They say who has the lock, and stay behind when nobody has.
"""

import contextlib
import datetime
import fcntl
import getpass
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stages.artifacts import RunDir
from stages.artifacts.run import explained
from stages.config import RunConfig, UserError

POLL_S = 1.0
DRIVER = Path("/proc/driver/nvidia")  # seen in every container too, with or without a GPU
CONTROL = Path("/dev/nvidiactl")  # which CUDA needs: only a container that was given a GPU has it
UUID = re.compile(r"^GPU UUID:\s*(GPU-[0-9a-fA-F-]+)\s*$", re.MULTILINE)


@contextlib.contextmanager
def held(run: RunDir, config: RunConfig, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds the device that `config` names while the body runs.

    Where another run has it: with `wait`, tells that function so once and waits; without, UserError naming that run.
    """
    name = device(config)
    if name is None:
        yield
        return
    descriptor = opened(lock_file(name))
    try:
        told = False
        while not taken(descriptor):
            message = f"{name} is at work for {holder(name) or 'another run'}"
            if wait is None:
                raise UserError(
                    message,
                    "wait until it has ended, choose another with CUDA_VISIBLE_DEVICES, or share it by steps.lock=none",
                )
            if not told:
                wait(f"waiting: {message}")
                told = True
            time.sleep(POLL_S)
        record(descriptor, run)
        yield
    finally:
        os.close(descriptor)  # releases it


def device(config: RunConfig) -> str | None:
    """The name of what the run locks; None where it locks nothing.

    Example: "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"

    UserError where there is a GPU whose name cannot be found out.
    """
    match config.steps.lock:
        case "none" | "":
            return None
        case "gpu":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            contained = config.steps.runner == "docker"
            if contained:
                match config.steps.gpus:
                    case "none":
                        return None
                    case "all":
                        visible = None
                    case numbers if numbers != "auto":
                        visible = numbers
            if visible is not None and visible.split(",")[0].strip() in ("", "-1"):
                return None  # CUDA is to see none, whatever is there
            return first_gpu(visible, gpus(given=contained))
        case name:
            return name


def first_gpu(visible: str | None, uuids: list[str]) -> str | None:
    """The UUID of the GPU that CUDA calls device 0. visible: CUDA_VISIBLE_DEVICES, of indices or (starts of) UUIDs."""
    if not uuids:
        return None
    if visible is None:
        return uuids[0]
    first = visible.split(",")[0].strip()
    if first.isdecimal():
        return uuids[int(first)] if int(first) < len(uuids) else None
    if first.startswith("MIG-"):
        return first
    return next((uuid for uuid in uuids if first and uuid.startswith(first)), None)


def gpus(*, given: bool = False) -> list[str]:
    """UUIDs of the machine's GPUs in PCI order; none where there is no driver. Makes CUDA count in the same order.

    given: Docker gives them to a container, so it does not matter whether this process could use them.
    Errors: UserError where there is a driver, but nothing says which GPUs it has.
    """
    uuids = by_tool()
    if not uuids and (DRIVER / "version").exists() and (given or CONTROL.exists()):
        uuids = by_driver()
        if not uuids:
            raise UserError(
                f"which GPUs there are is told neither by nvidia-smi nor below {DRIVER}, so none can be locked",
                "see that nvidia-smi works here, or share the GPU with steps.lock=none",
            )
    if uuids:
        # CUDA's own order is fastest first: index 1 would be another card here than there.
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return uuids


def by_tool() -> list[str]:
    """What nvidia-smi tells; nothing where it is missing, as in an image without NVIDIA's tools, or fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        done = subprocess.run(
            [command, "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.startswith("GPU-")]


def by_driver() -> list[str]:
    """What the driver itself lists, in the order of PCI addresses, which are the folders' names.

    Nothing when one UUID is missing, as of a card not yet woken (GPU-????????-...): the numbers would be of others.
    """
    uuids = []
    for path in sorted(DRIVER.glob("gpus/*/information")):
        try:
            found = UUID.search(path.read_text())
        except OSError:
            return []
        if found is None:
            return []
        uuids.append(found[1])
    return uuids


def holder(name: str) -> str:
    """Who holds the device, in words; empty when nobody does.

    Example: "data/runs/demo (process 4711 of anna on box, since 2026-01-31 09:12 UTC)"
    """
    try:
        descriptor = os.open(lock_file(name), os.O_RDONLY)
    except OSError:
        return ""
    try:
        if taken(descriptor):
            return ""
        body = json.loads(os.pread(descriptor, 4096, 0))
        return f"{body['run']} (process {body['pid']} of {body['user']} on {body['host']}, since {body['since']} UTC)"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
    finally:
        os.close(descriptor)


def folder() -> Path:
    """FLEXSINK_LOCKS, or a folder that all users of this machine share."""
    if os.environ.get("FLEXSINK_LOCKS"):
        return Path(os.environ["FLEXSINK_LOCKS"])
    # Where everybody may write there, as on Debian: /tmp is swept of old files, and a long run's lock is one.
    common = Path("/run/lock")
    everybody = common.is_dir() and common.stat().st_mode & stat.S_IWOTH
    return Path(common if everybody else tempfile.gettempdir(), "flexsink")


def lock_file(name: str) -> Path:
    return folder() / (re.sub(r"[^A-Za-z0-9._-]", "_", name) + ".lock")


def opened(path: Path) -> int:
    """A descriptor of the lock file. The first user makes folder and file so that every other may lock it too."""
    with explained(path.parent, "set FLEXSINK_LOCKS to a folder of yours"):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Docker makes a folder that it is to mount for root alone.
        if not os.environ.get("FLEXSINK_LOCKS") and path.parent.stat().st_mode & 0o777 != 0o777:
            with contextlib.suppress(PermissionError):
                path.parent.chmod(0o777)
        try:
            return os.open(path, os.O_RDWR)  # O_CREAT on another user's file is refused where protected_regular is set
        except FileNotFoundError:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            with contextlib.suppress(PermissionError):
                os.fchmod(descriptor, 0o666)
            return descriptor


def taken(descriptor: int) -> bool:
    """Whether the lock could be had, which it then is."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def record(descriptor: int, run: RunDir) -> None:
    body = {
        "run": str(run.path.resolve()),
        "pid": os.getpid(),
        "user": user(),
        "host": socket.gethostname(),
        "since": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}",
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(body).encode(), 0)


def user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"  # an id without a name, as in containers
