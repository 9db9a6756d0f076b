"""Reading runs back: `flexsink inspect RUN` and `flexsink runs`. It reads manifests and Parquet only, and never torch.

Building the command line stays instant: what reads Parquet and what draws tables is imported when a command runs.
"""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path


def add_inspect_arguments(parser: ArgumentParser) -> None:
    """Declare what `flexsink inspect` takes."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder, for example data/runs/demo")
    parser.add_argument("--iteration", type=_count, metavar="N", help="one iteration: its groups and its completions")
    parser.add_argument("--group", type=_count, metavar="G", help="only the completions of this group")
    parser.add_argument("--completion", metavar="ID", help="one completion whole, for example 00003-002-005")
    parser.add_argument("--top", type=_count, metavar="K", help="show the K best completions (3 when filtering)")
    parser.add_argument("--worst", action="store_true", help="show the worst completions instead of the best")
    parser.add_argument("--outcome", metavar="NAME", help="only completions that ended so, such as cheat")
    parser.add_argument("--min-reward", type=float, metavar="X", help="only completions with at least this reward")
    parser.add_argument("--max-reward", type=float, metavar="X", help="only completions with at most this reward")
    parser.add_argument(
        "--check",
        action="append",
        default=[],
        metavar="NAME=ANSWER",
        help="only completions of which a check says yes, no or unknown, such as depends_on_board=no, state_kept=yes",
    )
    parser.add_argument("--contains", metavar="TEXT", help="only completions whose program holds this text")
    parser.add_argument("--diff", type=_count, nargs=2, metavar=("M", "N"), help="what changed between two iterations")
    parser.add_argument("--tokens", action="store_true", help="with --completion: its tokens and their logprobs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def inspect(args: Namespace) -> int:
    """Print what the arguments ask for about one run; the exit code is 0, and expected failures are UserErrors."""
    from stages.runs.show import show

    return show(args)


def add_runs_arguments(parser: ArgumentParser) -> None:
    """Declare what `flexsink runs` takes."""
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("data/runs"),
        metavar="FOLDER",
        help="where the runs are (data/runs)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def list_runs(args: Namespace) -> int:
    """Print one line per run: its state, finished iterations, reward first to last, and size on disk."""
    from stages.runs.listing import show

    return show(args)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)
