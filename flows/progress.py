"""What a person sees of a run while it goes on: a live bar on a terminal, one line per finished stage anywhere else."""

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, TextIO

from stages.artifacts import Progress, StageId


class View(Protocol):
    """Told what happens to each stage, in the process and the thread that runs it."""

    def start(self, stage: StageId) -> None: ...
    def report(self, progress: Progress) -> None: ...
    def finish(self, stage: StageId, *, seconds: float, reused: bool) -> None: ...


class Views:
    """Several views told the same."""

    def __init__(self, views: Sequence[View]) -> None:
        self.views = list(views)

    def start(self, stage: StageId) -> None:
        for view in self.views:
            view.start(stage)

    def report(self, progress: Progress) -> None:
        for view in self.views:
            view.report(progress)

    def finish(self, stage: StageId, *, seconds: float, reused: bool) -> None:
        for view in self.views:
            view.finish(stage, seconds=seconds, reused=reused)


class Lines:
    """One plain line per finished stage; stages found done are counted in one line."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.last = Progress("", 0, 0)
        self.reused: list[StageId] = []

    def __enter__(self) -> "Lines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.mention_reused()

    def note(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def start(self, stage: StageId) -> None:
        self.mention_reused()
        self.last = Progress(str(stage), 0, 0)

    def report(self, progress: Progress) -> None:
        self.last = progress

    def finish(self, stage: StageId, *, seconds: float, reused: bool) -> None:
        if reused:
            self.reused.append(stage)
        else:
            self.note(finished_line(stage, self.last, seconds))

    def mention_reused(self) -> None:
        if self.reused:
            count = len(self.reused)
            self.note(f"{'reused':<14}{count} {'stages' if count > 1 else 'stage'}, the last is {self.reused[-1]}")
            self.reused = []


class Bars(Lines):
    """The same lines on a terminal, with a live bar of the stage at work under them."""

    def __init__(self, out: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        super().__init__(out)
        self.console = Console(file=self.out, highlight=False, soft_wrap=True)
        self.bars = RichProgress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}  {task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            console=self.console,
            refresh_per_second=4,
            transient=True,
        )
        self.bar: Any = None

    def __enter__(self) -> "Bars":
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.mention_reused()
        self.bars.stop()

    def note(self, text: str) -> None:
        self.bars.console.print(text, markup=False)

    def start(self, stage: StageId) -> None:
        super().start(stage)
        self.clear()
        self.bar = self.bars.add_task(str(stage), total=None, unit="", figures="")

    def report(self, progress: Progress) -> None:
        super().report(progress)
        if self.bar is not None:
            total = progress.total or None
            self.bars.update(
                self.bar, completed=progress.done, total=total, unit=progress.unit, figures=figures(progress)
            )

    def finish(self, stage: StageId, *, seconds: float, reused: bool) -> None:
        self.clear()
        super().finish(stage, seconds=seconds, reused=reused)

    def clear(self) -> None:
        if self.bar is not None:
            self.bars.remove_task(self.bar)
            self.bar = None


def figures(progress: Progress) -> str:
    """The fields of a progress as text: "tokens/s 5100  reward 1.25"."""
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in progress.fields.items()
    )


def finished_line(stage: StageId, last: Progress, seconds: float) -> str:
    done = f"{last.done} {last.unit}".strip() if last.total else ""
    return f"{stage!s:<14}{seconds:7.1f} s  {done:<18}{figures(last)}".rstrip()


def terminal(out: TextIO | None = None) -> Lines:
    """The view for this output: bars on a terminal, lines elsewhere."""
    stream = out or sys.stdout
    return Bars(stream) if stream.isatty() else Lines(stream)
