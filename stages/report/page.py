"""Puts the page together: one file, its style and script inside it, no request to anywhere.

The content security policy allows this script by its hash and nothing else, so a program that a model wrote stays text
even if a mistake here let its markup through.
"""

import base64
import hashlib
import json
import os
from dataclasses import asdict
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from stages.artifacts.run import explained
from stages.report import checks, games, training
from stages.report.contents import Contents

ORDER = (
    training.header,
    training.learning,
    games.held_out,
    games.replays,
    games.programs,
    training.outcomes,
    checks.dependence,
    games.in_training,
    training.inside,
    training.exports,
    training.timings,
    training.settings,
)
FOOTER = "<footer>Made by flexsink from the run's Parquet files. This page loads nothing from a network.</footer>"


def write(run_dir: Path, *, out: Path | None = None) -> Path:
    """Write the report of `run_dir` in one piece to `out` (run_dir/report.html) and return its path.

    Its folder is made where it is missing; UserError where it cannot be written.
    """
    from stages.report.collect import collect

    text = render(collect(run_dir))
    path = out or run_dir / "report.html"
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
    return path


def render(contents: Contents) -> str:
    """The whole page as text."""
    assets = files("stages.report")
    script = (assets / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template((assets / "page.html").read_text(encoding="utf-8")).substitute(
        title=f"{escape(contents.name)} - flexsink",
        style=(assets / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
        body="\n".join(filter(None, (section(contents) for section in ORDER))) + FOOTER,
        games=_inert([asdict(game.replay) for game in contents.games]),
    )


def _inert(value: object) -> str:
    """JSON that cannot close the element it stands in."""
    return json.dumps(value).replace("<", "\\u003c")
