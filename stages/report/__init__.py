"""The report of a run: one HTML file with its curves, outcomes, evaluations, programs and a replayed game.

It reads manifests and Parquet only, never torch, works on a run that is still going, and never runs a program that a
model wrote: the moves of a game were recorded when it was judged, and the task's own rules replay them.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path


def add_arguments(parser: ArgumentParser) -> None:
    """Declare what `flexsink report` takes."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder, for example data/runs/demo")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the page (RUN/report.html)")


def report(args: Namespace) -> int:
    """Write the report that the arguments ask for and print its path."""
    path = write_report(args.run, out=args.out)
    print(path)
    return 0


def write_report(run_dir: Path, *, out: Path | None = None) -> Path:
    """Write the report of the run in `run_dir` and return its path, `run_dir`/report.html unless `out` is given."""
    from stages.report.page import write

    return write(run_dir, out=out)
