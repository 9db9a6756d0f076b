"""Runs of the small stages, each killed before another of its operations on the disk, then gone on with.

    python -m tests.killed_run FOLDER [FIRST EVERY]

An audit hook sees each file or folder that the run is about to make, open for writing, rename or remove. For each of
them (or from FIRST every EVERY-th) a process forked from this one runs until there and is killed by SIGKILL; another
goes on with what is left. Prints, as JSON, what was wrong: nothing, if all is well. Stages run without Prefect.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.config import resolved
from flows.presets import preset
from flows.progress import Lines
from flows.steps import local
from flows.train import loop, stages_of
from stages.artifacts import RunDir, Session, survey
from stages.artifacts.journal import Journal
from tests import small_stages

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}


def run_all(path: Path) -> None:
    config = resolved(preset("tiny_test"))
    run = RunDir.open(path) if (path / "config.json").exists() else RunDir.create(path, config)
    with run.lock(), Session() as session, Lines(open(os.devnull, "w")) as view:
        loop(config, local(run, config, session, view))


def watch(path: Path, on_change: Callable[[str], None]) -> None:
    """Calls the function before each change below `path` that this process makes through Python."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in CHANGES
        if event == "open" and isinstance(arguments[2], int):
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and isinstance(arguments[0], str | os.PathLike) and str(arguments[0]).startswith(str(path)):
            on_change(f"{event} {Path(arguments[0]).relative_to(path)}")

    sys.addaudithook(hook)


def forked(action: Callable[[], None]) -> int:
    """The exit status of a child of this process that does it: negative is the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def changes_of(path: Path) -> list[str]:
    """Every change that a quiet run makes, in order."""
    log = path.with_name("changes.txt")

    def action() -> None:
        with open(log, "w", buffering=1) as file:
            watch(path, lambda change: print(change, file=file))
            run_all(path)

    assert forked(action) == 0
    return log.read_text().splitlines()


def killed_before(path: Path, number: int) -> int:
    """The exit status of a run that is killed before its change of that number."""
    count = 0

    def on_change(_: str) -> None:
        nonlocal count
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def action() -> None:
        watch(path, on_change)
        run_all(path)

    return forked(action)


def published(path: Path) -> dict[str, int]:
    """The inode of every finished stage's manifest."""
    found = path.rglob("manifest.json")
    return {str(each.relative_to(path)): each.stat().st_ino for each in found if ".tmp" not in str(each)}


def digests(path: Path) -> dict[str, str]:
    return {name: json.loads((path / name).read_text())["digest"] for name in published(path)}


def pieces(path: Path) -> dict[str, int]:
    """How many finished pieces of work each journal holds."""
    found = {str(each.relative_to(path)): len(Journal(each).records()) for each in path.rglob("*.journal")}
    return {name: count for name, count in found.items() if count}


def wrong_after(path: Path, wanted: dict[str, str]) -> list[str]:
    """What is wrong with the killed run once it has been gone on with."""
    done, journals = published(path), pieces(path)
    kept = {name: os.open(path / name, os.O_RDONLY) for name in journals}
    status = forked(lambda: run_all(path))
    found = [] if status == 0 else [f"resume ended with {status}"]
    if digests(path) != wanted:
        found.append("its content differs")
    if any(published(path).get(name) != inode for name, inode in done.items()):
        found.append("a finished stage was made again")
    for name, descriptor in kept.items():
        lines = os.pread(descriptor, 1 << 20, 0).decode().splitlines()
        numbers = [json.loads(line.split(" ", 1)[1])["piece"] for line in lines]
        if numbers != [0, 1, 2, 3]:
            found.append(f"{name} holds pieces {numbers}")
        os.close(descriptor)
    run = RunDir.open(path)
    config = run.config()
    if {decision.action for _, decision in survey(run, config, list(stages_of(config)))} != {"REUSE"}:
        found.append("plan would run more")
    left = [str(each) for each in path.rglob("*") if ".tmp-" in each.name or each.suffix == ".journal"]
    return found + [f"{each} is left" for each in left]


def main() -> None:
    folder, (first, every) = Path(sys.argv[1]), map(int, sys.argv[2:4]) if len(sys.argv) > 3 else (0, 1)
    small_stages.install()
    quiet = folder / "quiet"
    changes = changes_of(quiet)
    wanted = digests(quiet)
    problems: dict[str, list[str]] = {}
    for number in range(first, len(changes), every):
        path = folder / f"run-{number}"
        status = killed_before(path, number)
        found = wrong_after(path, wanted) if status == -signal.SIGKILL else [f"ended with {status} instead of a kill"]
        if found:
            problems[f"{number}: {changes[number]}"] = found
        shutil.rmtree(path)
    print(json.dumps({"changes": changes, "problems": problems}))


if __name__ == "__main__":
    main()
