"""`flexsink runs`: the runs of a folder, one line each."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any, Literal

from stages.artifacts import history
from stages.artifacts.parquet import read_table
from stages.artifacts.run import RunDir
from stages.artifacts.stage import StageId
from stages.config import UserError, pasteable


def show(args: Namespace) -> int:
    """Print the runs in `args.folder`, newest last, and return the exit code."""
    found = rows(args.folder)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    from rich.table import Table

    from stages.runs.tables import console, printable

    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("run", "created", "state", "iterations", "reward", "size"):
        wraps = name in ("run", "state")  # a long path or error is folded, figures never are
        justify: Literal["left", "right"] = "right" if name in ("iterations", "reward", "size") else "left"
        table.add_column(name, justify=justify, no_wrap=not wraps, overflow="fold")
    for row in found:
        table.add_row(*(printable(cell) for cell in cells(row)))
    console().print(table if found else f"There are no runs in {args.folder}.")
    return 0


def rows(folder: Path) -> list[dict[str, Any]]:
    """The runs of a folder, newest last; UserError when there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", "start a run with: flexsink train tiny")
    if (folder / "config.json").is_file():
        look = f"look at it with: {pasteable('flexsink', 'inspect', folder)}"
        raise UserError(f"{folder} is a run, not a folder of runs", look)
    found = [listed(path.parent) for path in folder.glob("*/environment.json")]
    return sorted(found, key=lambda row: (row["created"], row["run"]))


def cells(row: dict[str, Any], *, short: bool = False) -> list[str]:
    """A run's line as texts: its path (its name if `short`), created, state, iterations, reward, size."""
    return [
        Path(row["run"]).name if short else row["run"],
        row["created"][: 10 if short else 16],
        row["state"],
        f"{row['iterations']} of {row['planned']}" if row["planned"] else "",
        "" if row["first_reward"] is None else f"{row['first_reward']:.2f} -> {row['last_reward']:.2f}",
        f"{row['bytes'] / 2**20:.1f} MiB",
    ]


def listed(path: Path) -> dict[str, Any]:
    """One run's line; a run that cannot be read is listed as broken instead of hiding the others."""
    run = RunDir(path)
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    row: dict[str, Any] = {
        "run": str(path),
        "created": str(run.environment().get("created", "")),
        "state": "",
        "iterations": 0,
        "planned": 0,
        "first_reward": None,
        "last_reward": None,
        "bytes": sum(sizes),
    }
    try:
        config = run.config()
        updated = [stage for stage in history.finished(run) if stage.name == "update"]
        done = history.scored(run)
        row |= {"state": state(run), "iterations": len(updated), "planned": config.train.iterations}
        if done:
            row |= {"first_reward": mean_reward(run, done[0]), "last_reward": mean_reward(run, done[-1])}
    except UserError as error:
        row["state"] = f"broken: {error.message}"
    return row


def state(run: RunDir) -> str:
    """running while a process works on it, done when it is exported, else stopped."""
    if held(run.path / ".lock"):
        return "running"
    return "done" if is_done(run) else "stopped"


def is_done(run: RunDir) -> bool:
    """Whether the run's last update and its own export are there, whoever works on it now."""
    config = run.config()
    last = run.manifest(StageId("update", config.train.iterations - 1)) if config.train.iterations else None
    exported = run.manifest(StageId("export", config.train.iterations, config.export.format))
    return exported is not None and (last is not None or not config.train.iterations)


def held(lock: Path) -> bool:
    """Whether a process holds the lock file, without taking it away from one that is just about to."""
    import fcntl

    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def mean_reward(run: RunDir, iteration: int) -> float:
    """The mean reward of one scored iteration."""
    import pyarrow.compute as pc

    table = read_table(run.folder(StageId("score", iteration)), "scores", columns=["reward"])
    mean: float = pc.mean(table["reward"]).as_py()
    return mean
