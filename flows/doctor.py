"""`flexsink doctor`: is everything here that a run needs? One line each, with what to do about a failing one."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flows import devices, server
from stages.config import UserError
from stages.memory import host_bytes

DISK_BYTES = 5 * 2**30
MEMORY_BYTES = 4 * 2**30


class Line(NamedTuple):
    """Example: Line("docker", False, "no Docker daemon answers", "start Docker")"""

    name: str
    ok: bool
    detail: str
    hint: str = ""


def check() -> list[Line]:
    """Every check, in an order in which fixing the first failing one may fix later ones."""
    return [guard(name, action) for name, action in CHECKS.items()]


def guard(name: str, action: Callable[[], Line]) -> Line:
    try:
        return action()
    except UserError as error:
        return Line(name, False, error.message, error.hint)
    except Exception as error:
        # A broken installation can raise anything on import; that is what this command is to show.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Line(name, False, reason, "delete .venv, then: bash containers/bootstrap.sh")


def python() -> Line:
    version = platform.python_version()
    ok = (3, 11) <= sys.version_info[:2] < (3, 14)
    return Line("python", ok, version, "" if ok else "use Python 3.11, 3.12 or 3.13")


def torch() -> Line:
    import torch

    device = f"CUDA, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return Line("torch", True, f"{torch.__version__}, {device}")


def packages() -> Line:
    names = ("transformers", "peft", "bitsandbytes", "prefect", "pyarrow", "docker")
    return Line("packages", True, ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))


def docker() -> Line:
    from stages.sandbox import image

    client = image.connect()
    try:
        return Line("docker", True, f"engine {client.version().get('Version', 'unknown')}")
    finally:
        client.close()


def sandbox() -> Line:
    from stages.sandbox import image

    client = image.connect()
    try:
        return Line("sandbox image", True, image.require_image(client))
    finally:
        client.close()


def local_sandbox() -> Line:
    """Never fails: Docker is the backend unless somebody asks for this one."""
    from stages.sandbox import local

    try:
        return Line("local sandbox", True, f"sandbox.backend=local would work: {local.find_walls()}")
    except UserError as error:
        return Line("local sandbox", True, f"sandbox.backend=local would not work: {error.message}", error.hint)


def gpu() -> Line:
    """Fails only where a run could not tell which GPUs to lock: a machine without one trains the tiny model."""
    uuids = devices.gpus()
    if not uuids:
        return Line("gpu", True, "none with a driver: preset tiny trains without one, gpt_oss_* need 16 GB or more")
    users = {uuid: devices.holder(uuid) for uuid in uuids}
    busy = [f"{uuid} is at work for {who}" for uuid, who in users.items() if who]
    return Line("gpu", True, "; ".join([f"{len(uuids)} with a driver, {len(uuids) - len(busy)} free", *busy]))


def disk() -> Line:
    free = shutil.disk_usage(Path.cwd()).free
    ok = free >= DISK_BYTES
    hint = "" if ok else f"free {DISK_BYTES >> 30} GiB, or train with --run-dir on another disk"
    return Line("disk", ok, f"{free / 2**30:.1f} GiB free", hint)


def memory() -> Line:
    available = host_bytes()
    ok = available >= MEMORY_BYTES
    hint = "" if ok else f"the tiny run needs up to {MEMORY_BYTES >> 30} GiB: close other programs"
    return Line("memory", ok, f"{available / 2**30:.1f} GiB available", hint)


def model() -> Line:
    ok = Path("data/tiny/config.json").is_file()
    detail = "data/tiny" if ok else "data/tiny is not in this folder"
    return Line("tiny model", ok, detail, "" if ok else "run flexsink from the project's folder, or set model.source")


def prefect() -> Line:
    url = os.environ.get("PREFECT_API_URL")
    if url:
        ok = server.healthy(url)
        return Line("prefect", ok, url, "" if ok else "start that server, or unset PREFECT_API_URL for a local one")
    state = server.read_state(server.HOME)
    if state and server.healthy(state["url"]):
        return Line("prefect", True, f"{state['url'].removesuffix('/api')}, the project's own")
    return Line("prefect", True, "a server of the project's own starts with the first run")


CHECKS: dict[str, Callable[[], Line]] = {
    "python": python,
    "torch": torch,
    "packages": packages,
    "docker": docker,
    "sandbox image": sandbox,
    "local sandbox": local_sandbox,
    "gpu": gpu,
    "disk": disk,
    "memory": memory,
    "tiny model": model,
    "prefect": prefect,
}
