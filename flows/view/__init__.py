"""`flexsink view RUN`: a run in the terminal, from the list of runs down to one completion's tokens and games.

Building the command line stays instant: textual and what reads Parquet are imported when the command runs.
"""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from stages.config import UserError

TABS = ("verdict", "tokens", "program", "cases", "prompt")


def add_arguments(parser: ArgumentParser) -> None:
    """Declare what `flexsink view` takes."""
    parser.add_argument(
        "run",
        type=Path,
        nargs="?",
        default=Path("data/runs"),
        metavar="RUN",
        help="a run's folder, or a folder of runs (data/runs)",
    )
    parser.add_argument("--completion", metavar="ID", help="begin with this completion, for example 00003-002-005")
    parser.add_argument("--tab", choices=TABS, metavar="TAB", help=f"what to show of it: {', '.join(TABS)}")
    parser.add_argument("--light", action="store_true", help="dark on light; the key d changes it too")
    parser.add_argument("--snapshot", type=Path, metavar="FILE.svg", help="write a picture, without a terminal")
    parser.add_argument(
        "--size", type=_size, default=(100, 32), metavar="WxH", help="columns and rows of the picture (100x32)"
    )


def view(args: Namespace) -> int:
    """Browse the run, or write a picture of it; the exit code is 0, and expected failures are UserErrors."""
    from flows.view.app import browse, snapshot

    if args.tab and not args.completion:
        raise UserError("--tab shows a completion, and none is named", "for example --completion 00000-000-000")
    if args.snapshot and args.snapshot.suffix != ".svg":
        raise UserError(f"{args.snapshot}: the picture is an SVG", "give --snapshot a name that ends in .svg")
    if args.snapshot:
        print(snapshot(args))
    else:
        browse(args)
    return 0


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) >= 40 and int(height) >= 12):
        raise ArgumentTypeError(f"{text!r} is no size such as 100x32, of at least 40x12")
    return int(width), int(height)
