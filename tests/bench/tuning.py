"""How the scripts beside this one, tune_*.py, record what they found."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stages.bench.results import command_line, head, write


def write_figures(path: Path, script: str, figures: Mapping[str, Any]) -> None:
    """Writes the figures of `script`, of gpt-oss-20b's shapes in bfloat16, behind the head that every record has."""
    about = head(
        bench=script,
        command=command_line(sys.argv[1:], program=("python", f"tests/bench/{script}.py")),
        gpu=torch.cuda.get_device_name(),
        shape="gpt-oss-20b",
        dtype="bf16",
        cuda=torch.version.cuda or "",
    )
    write(path, {**about, **figures})
