"""`flexsink prune`: says what of a run, or of a folder of runs, can go, and deletes it when told to.

What it offers by itself nobody can miss: stages set aside when they were made again, tries that no resume would go on
with, half-written files of processes that are gone, runs in which nothing was ever made. On request: exports of other
formats than the run's own, and whole runs that are done. Everything that a manifest lists stays: resume checks every
byte of it. A run that a process works on is never touched: its lock is held while something of it is deleted.
"""

import contextlib
import json
import os
import shutil
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stages.config import UserError

DAY_S = 86400.0
YOUNG_S = 3600.0  # an empty run younger than this may be one that is just being started


class Found(NamedTuple):
    """One thing that can go. Example: Found(Path("data/runs/a/iterations/00003/.stale-score-0"), "set aside", 819)"""

    path: Path
    why: str
    bytes: int


def add_arguments(parser: ArgumentParser) -> None:
    """Declare what `flexsink prune` takes."""
    parser.add_argument(
        "where",
        type=Path,
        nargs="?",
        default=Path("data/runs"),
        metavar="RUN|FOLDER",
        help="a run, or a folder of runs (data/runs)",
    )
    parser.add_argument("--exports", action="store_true", help="also exports of other formats than the run's own")
    parser.add_argument(
        "--done-before", type=float, metavar="DAYS", help="also whole runs that were done more than DAYS days ago"
    )
    parser.add_argument("--yes", action="store_true", help="delete; without it nothing is")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def prune(args: Namespace) -> int:
    """Print what can go and, with --yes, delete it; the exit code is 0."""
    if args.done_before is not None and not args.done_before >= 0:
        raise UserError(f"--done-before is {args.done_before}", "a number of days, 0 or more")
    found: list[Found] = []
    busy: list[Path] = []
    for path in runs_in(args.where):
        with taken(path, delete=args.yes) as free:
            if not free:
                busy.append(path)
                continue
            here = removable(path, exports=args.exports, done_before=args.done_before)
            if args.yes:
                for each in here:
                    remove(each.path, inside=path)
            found += here
    tell(args, found, busy)
    return 0


def runs_in(where: Path) -> list[Path]:
    """The run in `where`, or the runs; UserError when there are none."""
    if (where / "environment.json").is_file() or (where / "config.json").is_file():
        return [where]
    if not where.is_dir():
        raise UserError(f"there is no folder {where}", "see the runs there are with: flexsink runs")
    return sorted(path.parent for path in where.glob("*/environment.json"))


@contextlib.contextmanager
def taken(path: Path, *, delete: bool) -> Iterator[bool]:
    """Whether nobody works on the run; where something is to be deleted its lock is held meanwhile."""
    from stages.artifacts.run import RunDir
    from stages.runs.listing import held

    locks = [path / ".lock", *path.rglob(".lock-*")]
    if any(held(lock) for lock in locks):
        yield False
    elif not delete:
        yield True
    else:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(RunDir(path).lock())
            except UserError:  # somebody was quicker
                yield False
                return
            yield True


def removable(path: Path, *, exports: bool, done_before: float | None) -> list[Found]:
    """What of one run can go, largest first; the whole run where nothing was made in it, or it was done long ago."""
    from stages.artifacts.run import RunDir
    from stages.runs import listing

    run = RunDir(path)
    if is_empty(path) and age_s(path / "environment.json") > YOUNG_S:
        return [Found(path, "an empty run: nothing was made in it", size(path))]
    try:
        config = run.config()
        if done_before is not None and listing.is_done(run) and newest_s(path) > done_before * DAY_S:
            return [Found(path, f"a run that was done {newest_s(path) / DAY_S:.0f} days ago", size(path))]
    except UserError:
        return []  # nothing is known of a run that cannot be read, so nothing of it goes
    found = [Found(each, "set aside when its stage was made again", size(each)) for each in path.rglob(".stale-*")]
    wanted, unknown = awaited(path)
    for each in path.rglob(".tmp-*"):
        if each.name.removeprefix(".tmp-") not in wanted and each.parent not in unknown:
            found.append(Found(each, "a try that no resume would go on with", size(each)))
    for each in path.glob(".*.*"):
        number = each.name.rpartition(".")[2]
        if each.is_file() and number.isdecimal() and not Path("/proc", number).exists():
            found.append(Found(each, "half-written by a process that is gone", size(each)))
    if exports:
        for each in path.glob("export/[!.]*"):
            if each.name != config.export.format:
                found.append(Found(each, f"an export that is not the run's own ({config.export.format})", size(each)))
    return sorted(found, key=lambda each: (-each.bytes, each.path))


def awaited(path: Path) -> tuple[set[str], set[Path]]:
    """The keys under which a resume would go on, and the folders of stages whose keys are not known yet."""
    from flows.train import stages_of
    from stages.artifacts import RunDir, survey

    run = RunDir(path)
    keys, unknown = set(), set()
    for stage, decision in survey(run, run.config(), list(stages_of(run.config()))):
        if decision.action == "RUN" and decision.key:
            keys.add(decision.key)
        elif decision.action == "RUN":
            unknown.add(run.folder(stage).parent)
    return keys, unknown


def is_empty(path: Path) -> bool:
    """Whether no stage was published in the run and none has begun a journal."""
    return not any(path.rglob("manifest.json")) and not any(path.rglob(".tmp-*"))


def newest_s(path: Path) -> float:
    """Seconds since a stage of the run was published last."""
    return min((age_s(each) for each in path.rglob("manifest.json")), default=0.0)


def age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime if path.exists() else 0.0


def size(path: Path) -> int:
    """Bytes of a file or of everything in a folder, links not followed."""
    if path.is_file() or path.is_symlink():
        return path.lstat().st_size
    return sum(each.lstat().st_size for each in path.rglob("*") if not each.is_dir())


def remove(path: Path, *, inside: Path) -> None:
    """Deletes a file or a folder of the run; a link is deleted, not what it points to."""
    assert path == inside or inside in path.parents, f"{path} is not in {inside}"
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise UserError(
            f"cannot delete {path}: {os.strerror(error.errno or 0)}", "change its owner or rights"
        ) from error


def tell(args: Namespace, found: list[Found], busy: list[Path]) -> None:
    """Print what can go, or went."""
    total = sum(each.bytes for each in found)
    if args.json:
        rows = [{"path": str(each.path), "why": each.why, "bytes": each.bytes} for each in found]
        body = {"deleted": args.yes, "bytes": total, "found": rows, "busy": [str(path) for path in busy]}
        print(json.dumps(body, indent=2))
        return
    from rich.table import Table

    from stages.runs.tables import console, printable

    out = console()
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("what", overflow="fold")
    table.add_column("why", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for each in found:
        table.add_row(printable(str(each.path)), each.why, f"{each.bytes / 2**20:.1f} MiB")
    if found:
        out.print(table)
    for path in busy:
        out.print(f"{printable(str(path))} is being worked on: left alone")
    if not found:
        out.print("Nothing to delete.")
    elif args.yes:
        out.print(f"Deleted {total / 2**20:.1f} MiB.")
    else:
        out.print(f"{total / 2**20:.1f} MiB could go. Nothing was deleted; the same command with --yes does it.")
