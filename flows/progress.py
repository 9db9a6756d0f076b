"""What a person sees of a run while it goes on: a live bar on a terminal, one line per finished stage anywhere else.

With logging.format=json every line is one JSON object, and so is every record of the log file.
"""

import datetime
import json
import logging
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, TextIO

from stages.artifacts import Progress, StageId


class View(Protocol):
    """Told what happens to each stage, in the process and the thread that runs it."""

    def expect(self, stages: Sequence[StageId]) -> None: ...
    def start(self, stage: StageId) -> None: ...
    def report(self, progress: Progress) -> None: ...
    def finish(self, stage: StageId, *, seconds: float, reused: bool) -> None: ...


class Views:
    """Several views told the same."""

    def __init__(self, views: Sequence[View]) -> None:
        self.views = list(views)

    def expect(self, stages: Sequence[StageId]) -> None:
        for view in self.views:
            view.expect(stages)

    def start(self, stage: StageId) -> None:
        for view in self.views:
            view.start(stage)

    def report(self, progress: Progress) -> None:
        for view in self.views:
            view.report(progress)

    def finish(self, stage: StageId, *, seconds: float, reused: bool) -> None:
        for view in self.views:
            view.finish(stage, seconds=seconds, reused=reused)


class Clock:
    """How much of a run is done, and how long the rest may take, going by the stages that this process has run."""

    def __init__(self, stages: Sequence[StageId] = ()) -> None:
        self.total = len(stages)
        self.remaining = list(stages)
        self.seconds: dict[str, list[float]] = {}
        self.started = time.monotonic()
        self.reward: float | None = None
        # the mean of the last scored iteration

    @property
    def done(self) -> int:
        return self.total - len(self.remaining)

    def start(self) -> None:
        self.started = time.monotonic()

    def report(self, progress: Progress) -> None:
        reward = progress.fields.get("mean reward")
        if isinstance(reward, float) and progress.done == progress.total:
            self.reward = reward

    def finish(self, stage: StageId, *, seconds: float, reused: bool) -> None:
        if stage in self.remaining:
            self.remaining.remove(stage)
        if not reused:
            self.seconds.setdefault(stage.name, []).append(seconds)
        self.start()

    def left_s(self) -> float | None:
        """Seconds until the last stage ends; None while a stage of the loop has not been timed once."""
        total = 0.0
        for place, stage in enumerate(self.remaining):
            taken = self.seconds.get(stage.name)
            if not taken:
                if stage.name in ("rollout", "score", "update"):
                    return None
                continue  # load, evaluate and export come once or seldom: their time is not known before
            mean = sum(taken[-5:]) / len(taken[-5:])
            spent = time.monotonic() - self.started if place == 0 else 0.0
            total += max(mean - spent, 0.0)
        return total

    def text(self) -> str:
        """Example: "reward 2.914  4:10 left" """
        parts = [] if self.reward is None else [f"reward {self.reward:.3f}"]
        left = self.left_s()
        if left is not None and self.remaining:
            parts.append(f"{datetime.timedelta(seconds=round(left))} left")
        return "  ".join(parts)


class Lines:
    """One plain line per finished stage; stages found done are counted in one line."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.last = Progress("", 0, 0)
        self.reused: list[StageId] = []
        self.clock = Clock()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.mention_reused()

    def note(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def expect(self, stages: Sequence[StageId]) -> None:
        self.clock = Clock(stages)

    def start(self, stage: StageId) -> None:
        self.mention_reused()
        self.last = Progress(str(stage), 0, 0)
        self.clock.start()

    def report(self, progress: Progress) -> None:
        self.last = progress
        self.clock.report(progress)

    def finish(self, stage: StageId, *, seconds: float, reused: bool) -> None:
        self.clock.finish(stage, seconds=seconds, reused=reused)
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
    """The same lines on a terminal; under them live bars, of the stage at work and of the whole run."""

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
        self.whole: Any = None

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

    def expect(self, stages: Sequence[StageId]) -> None:
        super().expect(stages)
        self.whole = self.bars.add_task("run", total=len(stages), unit="stages", figures="")

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
        self.update_whole()

    def finish(self, stage: StageId, *, seconds: float, reused: bool) -> None:
        self.clear()
        super().finish(stage, seconds=seconds, reused=reused)
        self.update_whole()

    def update_whole(self) -> None:
        if self.whole is not None:
            self.bars.update(self.whole, completed=self.clock.done, figures=self.clock.text())

    def clear(self) -> None:
        if self.bar is not None:
            self.bars.remove_task(self.bar)
            self.bar = None


class JsonLines(Lines):
    """One JSON object a line: notes, finished and reused stages, and now and then how far the stage at work is.

    Example: {"done": 48, "event": "finished", "seconds": 8.1, "stage": "rollout 3", "time": "...", "tokens/s": 5100.0}
    """

    EVERY_S = 10.0

    def __init__(self, out: TextIO | None = None) -> None:
        super().__init__(out)
        self.next = 0.0

    def note(self, text: str) -> None:
        self.write("note", message=text)

    def start(self, stage: StageId) -> None:
        super().start(stage)
        self.next = time.monotonic() + self.EVERY_S
        self.write("started", stage=str(stage))

    def report(self, progress: Progress) -> None:
        super().report(progress)
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + self.EVERY_S
            self.write("progress", total=progress.total, left_s=self.clock.left_s(), **fields(progress))

    def finish(self, stage: StageId, *, seconds: float, reused: bool) -> None:
        self.clock.finish(stage, seconds=seconds, reused=reused)
        if reused:
            self.write("reused", stage=str(stage))
        else:
            self.write("finished", seconds=round(seconds, 3), **fields(self.last))

    def write(self, event: str, **body: Any) -> None:
        body |= {"event": event, "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")}
        print(json.dumps(body, sort_keys=True), file=self.out, flush=True)


class JsonFormatter(logging.Formatter):
    """A log record as one JSON object: time (UTC), level, logger, message, and error with a traceback's text."""

    def format(self, record: logging.LogRecord) -> str:
        time_of = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        body = {"time": time_of, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            body["error"] = self.formatException(record.exc_info)
        return json.dumps(body)


def fields(progress: Progress) -> dict[str, Any]:
    return {"stage": progress.stage, "done": progress.done, "unit": progress.unit, **progress.fields}


def described(progress: Progress) -> str:
    """Example: "rollout 3: 12 of 48 completions, tokens/s 5100" """
    parts = [f"{progress.done} of {progress.total} {progress.unit}".rstrip()] if progress.total else []
    text = figures(progress)
    return f"{progress.stage}: {', '.join([*parts, text] if text else parts)}".removesuffix(": ")


def figures(progress: Progress) -> str:
    """The fields of a progress as text: "tokens/s 5100  reward 1.25"."""
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in progress.fields.items()
    )


def finished_line(stage: StageId, last: Progress, seconds: float) -> str:
    done = f"{last.done} {last.unit}".strip() if last.total else ""
    return f"{stage!s:<14}{seconds:7.1f} s  {done:<18}{figures(last)}".rstrip()


def terminal(form: str = "text", out: TextIO | None = None) -> Lines:
    """The view for this output: JSON where that is asked for, bars on a terminal, lines elsewhere."""
    stream = out or sys.stdout
    return Bars(stream) if stream.isatty() and form != "json" else plain(form, stream)


def plain(form: str = "text", out: TextIO | None = None) -> Lines:
    """The view that moves nothing about: one line, or one JSON object, per event."""
    return JsonLines(out) if form == "json" else Lines(out)
