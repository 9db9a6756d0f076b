"""How a benchmark's figures are recorded in tests/bench/results, and laid out as a table. No torch, no rich: a bare GPU
machine has none of the latter.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.artifacts.run import explained

Row = Mapping[str, Any]
RESULTS = Path("tests/bench/results")
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes")


def head(*, bench: str, command: str, gpu: str, shape: str, dtype: str, cuda: str) -> dict[str, Any]:
    """What the JSON of benchmark `bench` begins with."""
    versions = {"python": platform.python_version(), "cuda": cuda}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "bench": bench,
        "weights": "synthetic",
        "gpu": gpu,
        "date": today(),
        "versions": versions,
        "command": command,
        "shape": shape,
        "dtype": dtype,
    }


def command_line(words: list[str], program: tuple[str, ...] = ("flexsink",)) -> str:
    """The command that measures this again; where the figures went is left out."""
    kept = list(words)
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return shlex.join([*program, *kept])


def today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def default_path(bench: str, gpu: str) -> Path:
    """tests/bench/results/<bench>-<gpu>-<date>.json, in the current folder where there is no such folder."""
    words = re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")
    name = f"{bench}-{words}-{today()}.json"
    return RESULTS / name if RESULTS.is_dir() else Path(name)


def write(path: Path, body: Row) -> None:
    """Writes the JSON at once or not at all."""
    with explained(path.parent, "choose another file with --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".tmp")
        part.write_text(json.dumps(rounded(body), indent=1) + "\n")
        os.replace(part, path)


def rounded(value: Any) -> Any:
    """The same with five significant digits; bytes and counts stay whole."""
    if isinstance(value, Mapping):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def error_words(error: BaseException) -> str:
    """What a row says of a failure."""
    return f"{type(error).__name__}: {str(error).strip()[:200]}"


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> Iterator[str]:
    """The rows under their columns' names, the first `words` columns on the left, the others on the right."""
    table = [tuple(columns), *rows]
    widths = [max(len(line[column]) for line in table) for column in range(len(columns))]
    for line in table:
        cells = [
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def gigabytes(count: float) -> str:
    """GB of 10^9 bytes."""
    return f"{count / 1e9:.1f}"
