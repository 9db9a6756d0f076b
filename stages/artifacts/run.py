"""The run directory: where everything is, and who may write in it."""

import contextlib
import datetime
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.artifacts.manifest import Manifest, fsync, versions
from stages.artifacts.stage import StageId
from stages.config import RunConfig, UserError, pasteable


class RunDir:
    """data/runs/<name>: config.json, environment.json, a folder per stage, logs/.

    Example: run = RunDir.create(Path("data/runs/demo"), config); run.folder(StageId("rollout", 3))
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> "RunDir":
        """A new run in `path`, which must not hold one yet; config.json is its last file."""
        run = cls(path)
        with explained(path):
            if (path / "config.json").exists():
                again = pasteable("flexsink", "resume", path)
                raise UserError(f"{path} already holds a run", f"go on with it by: {again}")
            entries = list(path.iterdir()) if path.is_dir() else []
            halves = [entry for entry in entries if entry.name.startswith(HALVES)]  # of a kill in this very function
            if any(entry.name not in KNOWN for entry in entries if entry not in halves):
                raise UserError(f"{path} is not empty and holds no run", "choose another folder with --run-dir")
            for entry in halves:
                entry.unlink()
            (path / "logs").mkdir(parents=True, exist_ok=True)
            write_json(path / "environment.json", environment(config.task.name))
            write_json(path / "config.json", config.to_dict())
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        """The run in `path`; UserError when there is none."""
        if not (path / "config.json").is_file():
            usual = Path("data/runs", path)
            there = (usual / "config.json").is_file()
            hint = f"did you mean {usual}?" if there else "see the runs there are with: flexsink runs"
            raise UserError(f"{path} holds no run: it has no config.json", hint)
        return cls(path)

    def config(self) -> RunConfig:
        with explained(self.path):
            return RunConfig.from_json((self.path / "config.json").read_bytes())

    def save_config(self, config: RunConfig) -> None:
        with explained(self.path):
            write_json(self.path / "config.json", config.to_dict())

    def environment(self) -> dict[str, Any]:
        """The machine and versions the run was created with, and its id."""
        try:
            body: dict[str, Any] = json.loads((self.path / "environment.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return body

    def folder(self, stage: StageId) -> Path:
        return self.path / stage.folder

    def manifest(self, stage: StageId) -> Manifest | None:
        """The manifest of a published stage, its files unchecked; None when there is none."""
        return Manifest.read(self.folder(stage))

    def is_blank(self) -> bool:
        """Whether no stage was ever published here."""
        return not any(self.path.rglob("manifest.json"))

    def discard(self) -> bool:
        """Removes what a run wrote that published no stage, and its folder where nothing else is in it.

        False, and nothing is removed, where a stage was published or another process works on the run.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.lock())
            except UserError:
                return False
            if not self.is_blank():
                return False
            for path in [path for pattern in UNFINISHED for path in self.path.glob(pattern)]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        for folder in (self.logs, self.path):
            with contextlib.suppress(OSError):
                folder.rmdir()  # not where others have files in it, such as the log of the job that runs this
        return True

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def labels(self) -> dict[str, str]:
        """What every container of this run is labelled with: the id it was given when it was created."""
        return {"flexsink.run": str(self.environment().get("run_id") or self.path.resolve())}

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the one process that works on the whole run; UserError when another one does."""
        with locked(self.path / ".lock", f"{self.path} is being worked on by another process", wait=False):
            yield

    def is_busy(self) -> bool:
        """Whether a process works on the run."""
        try:
            with self.lock():
                return False
        except UserError:
            return True


KNOWN = {"logs", "environment.json", "config.json", ".lock"}
HALVES = (".environment.json.", ".config.json.")  # what write_json leaves when it is killed
# All that a run without a stage has written, as patterns. Its lock comes last: until then nobody else begins.
UNFINISHED = (
    "config.json",
    "environment.json",
    ".tmp-*",
    ".lock-load",
    "logs/flexsink.log",
    "logs/flow_runs.txt",
    "logs/tracked-*.txt",
    "logs/metrics.prom",
    ".lock",
)
ANOTHER = "choose another folder with --run-dir"
ELSEWHERE = "choose another place"
NO_SPACE = "free some space (flexsink runs shows what is large), then go on with: flexsink resume RUN"


@contextlib.contextmanager
def locked(path: Path, message: str, *, wait: bool, hint: str = ANOTHER) -> Iterator[None]:
    """Holds the lock file; when another process does, waits for it or raises UserError. A kill releases it.

    hint: what helps where the file cannot be written
    """
    from filelock import FileLock, Timeout

    with explained(path.parent, hint):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            raise UserError(message, "wait until it has finished, or end it") from None
        except NotImplementedError:
            raise UserError(f"{path.parent} lies on a file system without locks", hint) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def explained(path: Path, hint: str = ANOTHER) -> Iterator[None]:
    """Turns a full disk, a read-only folder or missing rights into a UserError that says so.

    path: the folder that is worked in; hint: what helps where that is at fault
    """
    try:
        yield
    except OSError as error:
        known = explanation(error, path, hint)
        if known is None:
            raise
        raise known from error


def explanation(error: BaseException, path: Path, hint: str = ANOTHER) -> UserError | None:
    """The UserError for an operating system error a person can do something about; None for any other.

    hint: what helps where the file is in `path`, or `path` in it; of another, such as a checkpoint, only its owner can
    """
    import errno

    for seen in causes(error):
        if isinstance(seen, OSError):
            where = Path(os.fsdecode(seen.filename)) if isinstance(seen.filename, str | bytes) else path
            inside = where.is_relative_to(path) or path.is_relative_to(where)
            match seen.errno:
                case errno.ENOSPC | errno.EDQUOT:
                    return UserError(f"the disk is full: {path}", NO_SPACE)
                case errno.EROFS:
                    return UserError(f"{where} lies on a read-only file system", hint if inside else ELSEWHERE)
                case errno.EACCES | errno.EPERM:
                    more = f", or {hint}" if inside else ""
                    return UserError(f"no permission to read or write {where}", f"change its owner or its mode{more}")
                case errno.ENAMETOOLONG:
                    return UserError(f"too long a name: {shortened(where)}", "choose a shorter one")
                case errno.ENOTDIR | errno.EEXIST:
                    return UserError(f"{where} is a file, not a folder", hint if inside else ELSEWHERE)
    return None


def shortened(path: Path) -> str:
    """Both ends of a long path."""
    text = str(path)
    return text if len(text) <= 120 else f"{text[:60]} ... {text[-50:]}"


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it was raised from, and so on."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def error_number(error: BaseException) -> int | None:
    """The errno of the first operating system error among an error and its causes; None where there is none.

    Libraries in Rust, such as safetensors, raise errors of their own that end with "(os error 28)".
    """
    for seen in causes(error):
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        if found := re.search(r"\(os error (\d+)\)", str(seen)):
            return int(found[1])
    return None


def write_json(path: Path, body: Any) -> None:
    """Replaces a JSON file in one step: never half of it is seen."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w") as file:
            json.dump(body, file, indent=2, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def environment(task: str) -> dict[str, Any]:
    return {
        "run_id": os.urandom(16).hex(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions(task),
    }
