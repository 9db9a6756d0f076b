"""What `flexsink export` does after the stage: a folder of the person's own, and a word when gain was lost."""

import json
import os
import shutil
from pathlib import Path

from stages.artifacts.manifest import NAME, TIMINGS
from stages.artifacts.run import explained

ANOTHER = "choose another folder with --out"


def deliver(folder: Path, out: Path) -> None:
    """Copies an export, without its manifest and timings, to `out`, which appears whole or not at all."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    with explained(out, ANOTHER):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            copy(folder, temporary)
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def copy(folder: Path, to: Path) -> None:
    """Copies what an export's folder holds but manifest and timings; the first OSError ends it."""
    # shutil.copytree goes on after an error, and tells them all in one without a number.
    to.mkdir()
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            copy(path, to / path.name)
        elif path.name not in (NAME, TIMINGS):
            shutil.copy2(path, to / path.name)


def kept(folder: Path) -> str:
    """What the export says about a gain it does not keep; empty when it keeps at least 90 %."""
    try:
        body = json.loads((folder / "export.json").read_text())
    except (FileNotFoundError, ValueError):
        return ""
    share = body.get("gain_kept")
    if share is None or share >= 0.9:
        return ""
    return f"warning: the export keeps {100 * share:.0f} % of the gain; the rest is in its residual adapter"
