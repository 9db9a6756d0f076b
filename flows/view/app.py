"""The terminal browser: which screen it begins with, its colours, and a picture of it as SVG."""

import re
import sys
from argparse import Namespace
from pathlib import Path

from textual.app import App
from textual.binding import Binding
from textual.pilot import Pilot
from textual.theme import Theme

from flows.view.completion import CompletionPage
from flows.view.evaluations import held_out_ids
from flows.view.iterations import GroupPage, IterationPage, RunPage
from flows.view.page import Page
from flows.view.runs import RunsPage
from stages.artifacts.run import RunDir
from stages.config import UserError
from stages.runs import show

DARK = Theme(
    name="flexsink-dark", dark=True, primary="#a79dff", secondary="#8bb8ff", accent="#d59cf0", warning="#f0a875",
    error="#ff7a85", success="#62c495", foreground="#ece6dc", background="#161412", surface="#1f1c19", panel="#2b2722",
)  # fmt: skip
LIGHT = Theme(
    name="flexsink-light", dark=False, primary="#5146b5", secondary="#2a5db0", accent="#8a3fa0", warning="#a8501c",
    error="#b3313f", success="#237a57", foreground="#26221d", background="#f8f6f1", surface="#ffffff", panel="#e9e4da",
)  # fmt: skip


class Browser(App[None]):
    """Example: Browser(Path("data/runs/demo"), completion="00003-002-005", tab="tokens").run()"""

    ENABLE_COMMAND_PALETTE = False
    TITLE = "flexsink"
    BINDINGS = [  # noqa: RUF012 - textual declares it so
        Binding("q", "quit", "Quit"),
        Binding("d", "change_colours", "Dark or light", show=False),
    ]

    def __init__(self, path: Path, *, completion: str | None = None, tab: str | None = None, light: bool = False):
        """Errors: UserError when `path` holds neither a run nor runs, or the run has no such completion."""
        super().__init__()
        self.pages = pages(path, completion=completion, tab=tab)
        for theme in (DARK, LIGHT):
            self.register_theme(theme)
        self.theme = LIGHT.name if light else DARK.name

    def on_mount(self) -> None:
        for page in self.pages:
            self.push_screen(page)

    def action_change_colours(self) -> None:
        self.theme = LIGHT.name if self.current_theme.dark else DARK.name


def pages(path: Path, *, completion: str | None, tab: str | None) -> list[Page]:
    """The screens to begin with, each above the one that Escape goes back to."""
    if not (path / "config.json").is_file():
        if completion is not None or not path.is_dir():
            RunDir.open(path)  # says what is wrong with it
        return [RunsPage(path)]
    run = RunDir.open(path)
    run.config()
    found: list[Page] = [RunsPage(path.resolve().parent), RunPage(run)]
    if completion is None:
        return found
    row = show.completion(run, completion)
    if completion.startswith("e"):
        return [*found, CompletionPage(run, held_out_ids(run, completion), completion, tab=tab)]
    iteration, group = int(completion.split("-")[0]), int(row["group_index"])
    found += [IterationPage(run, iteration), GroupPage(run, iteration, group)]
    ids = [name for name in show.ids(run, iteration) if name.startswith(completion[:9])]
    return [*found, CompletionPage(run, ids, completion, tab=tab)]


def browse(args: Namespace) -> None:
    """Runs the browser in this terminal until it is left."""
    app = Browser(args.run, completion=args.completion, tab=args.tab, light=args.light)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("flexsink view needs a terminal", "without one: flexsink view RUN --snapshot FILE.svg")
    app.run()


def snapshot(args: Namespace) -> Path:
    """Writes what the browser begins with as an SVG picture, without a terminal, and returns its path."""
    import asyncio

    app = Browser(args.run, completion=args.completion, tab=args.tab, light=args.light)
    app.animation_level = "none"

    async def draw() -> str:
        async with app.run_test(size=args.size) as pilot:
            await settled(pilot)
            return app.export_screenshot(title=f"flexsink view {args.run}")

    picture = without_network(asyncio.run(draw()))
    path: Path = args.snapshot
    try:
        path.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "choose another file with --snapshot") from error
    return path


async def settled(pilot: Pilot[None]) -> None:
    """Returns when the screen shows what it has read."""
    await pilot.pause()
    while isinstance(pilot.app.screen, Page) and not pilot.app.screen.ready:
        await pilot.pause(0.02)
    await pilot.pause()


def without_network(picture: str) -> str:
    """The picture without the fonts it would fetch; the viewer's own monospace font takes their place."""
    return re.sub(r"@font-face\s*\{[^}]*\}", "", picture).replace("Fira Code, monospace", "monospace")
