"""A stage's manifest: what it wrote, under which key, and whether that is still what lies on the disk."""

import functools
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stages.artifacts.journal import SUFFIX
from stages.config import canonical_json

NAME = "manifest.json"
TIMINGS = "timings.parquet"
FORMAT = 1
TASKS = "flexsink.tasks"  # the entry points of tasks that other distributions bring: stages/tasks/plugins.py


class Manifest(NamedTuple):
    """Example: Manifest.read(run.folder(StageId("rollout", 3))).digest"""

    key: str
    digest: str
    # of the content: every file but timings.parquet, in name order
    files: dict[str, dict[str, Any]]
    # name -> {"sha256": hex, "bytes": int}
    inputs: dict[str, Any]
    # what the key is made of
    recorded: dict[str, Any]
    # code digest, versions, runner: not in the key; `plan` warns when they differ

    @classmethod
    def of(cls, folder: Path, *, key: str, inputs: dict[str, Any], recorded: dict[str, Any]) -> "Manifest":
        """The manifest of everything in `folder`, journals left out."""
        paths = {name: folder / name for name in content(folder)}
        files = {name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for name, path in paths.items()}
        return cls(key=key, digest=digest_of(files), files=files, inputs=inputs, recorded=recorded)

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """The manifest in `folder`; None when there is none or it is not a manifest."""
        try:
            body = json.loads((folder / NAME).read_text())
            manifest = cls(**{name: body[name] for name in cls._fields})
            if digest_of(manifest.files) != manifest.digest:
                return None
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return manifest

    def write(self, folder: Path) -> None:
        """Writes it as the folder's last file, on the disk when this returns."""
        path = folder / NAME
        with open(path, "w") as file:
            json.dump({"format": FORMAT, **self._asdict()}, file, indent=1, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        fsync(folder)

    def damage(self, folder: Path) -> str:
        """What is wrong with the files of a finished stage, in a few words; empty when every byte is right."""
        for name, entry in sorted(self.files.items()):
            path = folder / name
            try:
                if path.stat().st_size != entry["bytes"]:
                    return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
                if sha256_of(path) != entry["sha256"]:
                    return f"{name} is corrupt: its sha256 differs"
            except (FileNotFoundError, NotADirectoryError):
                return f"{name} is missing"
        extra = sorted(set(content(folder)) - set(self.files))
        return f"{extra[0]} does not belong there" if extra else ""


def content(folder: Path) -> list[str]:
    """Names of a stage's files relative to its folder, in order; neither the manifest nor journals."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in names if name != NAME and not name.endswith(SUFFIX))


def digest_of(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The content digest: sha256 over the (name, sha256) of every file but timings.parquet, in name order."""
    return hashlib.sha256(
        canonical_json([[name, files[name]["sha256"]] for name in sorted(files) if name != TIMINGS]).encode()
    ).hexdigest()


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Returns when the file's bytes, or the folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def recorded(*, task: str, **more: str) -> dict[str, Any]:
    """What is recorded beside a stage and is in no key: what would have to be the same for equal bytes elsewhere."""
    facts = {"code": code_digest(), "versions": versions(task), "machine": platform.machine(), **more}
    return facts | ({"task_code": digest} if (digest := task_digest(task)) else {})


@functools.cache
def versions(task: str) -> dict[str, str]:
    """Versions of the packages whose arithmetic or file format ends up in an artifact, and of the one with the task."""
    import importlib.metadata

    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft", "bitsandbytes", "safetensors", "pyarrow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for point in importlib.metadata.entry_points(group=TASKS, name=task):
        if point.dist is not None:
            found[point.dist.name] = point.dist.version
    return found


@functools.cache
def code_digest() -> str:
    """The sha256 of every Python file under stages/, in name order."""
    root = Path(__file__).parent.parent
    return _digest(root, root.rglob("*.py"))


@functools.cache
def task_digest(task: str) -> str:
    """The sha256 of the package with a task that another distribution brings, which may change while its version does
    not; empty for the project's own.
    """
    import importlib.metadata
    import importlib.util

    for point in importlib.metadata.entry_points(group=TASKS, name=task):
        spec = importlib.util.find_spec(point.module.partition(".")[0])
        if spec is not None and spec.origin is not None:
            module = Path(spec.origin)
            package = spec.submodule_search_locations is not None
            return _digest(module.parent, module.parent.rglob("*") if package else [module])
    return ""


def _digest(root: Path, paths: Iterable[Path]) -> str:
    """The sha256 of those that are files, in name order; what Python keeps of them compiled is left out."""
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file() and "__pycache__" not in path.parts):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
