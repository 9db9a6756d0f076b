"""What a stage is called, what it is given, and what it says while it works."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from stages.artifacts.journal import SUFFIX, Journal
from stages.config import RunConfig

if TYPE_CHECKING:
    from stages.artifacts.run import RunDir

Built = TypeVar("Built")


@dataclass(frozen=True, order=True)
class StageId:
    """One stage of one run. For rollout, score and update `index` is the iteration; for evaluate and export it is the
    number of updates the policy has had.

    Example: StageId("rollout", 3), StageId("evaluate", 0), StageId("export", 24, "mxfp4")
    """

    name: str
    index: int | None = None
    label: str = ""

    @property
    def folder(self) -> Path:
        """The stage's folder, relative to the run directory."""
        if self.name in ("rollout", "score", "update"):
            return Path("iterations", f"{self.index:05d}", self.name)
        if self.name == "evaluate":
            return Path("evaluations", f"{self.index:05d}")
        if self.name == "export":
            return Path("export", self.label)
        return Path(self.name)

    def __str__(self) -> str:
        if self.name == "export":
            return f"export {self.label}"
        return self.name if self.index is None else f"{self.name} {self.index}"


class Progress(NamedTuple):
    """Example: Progress("rollout 3", 12, 32, "completions", {"tokens/s": 5100.0})"""

    stage: str
    done: int
    total: int
    unit: str = ""
    fields: Mapping[str, float | str] = {}


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """A report that nobody reads."""


class Session:
    """What a process keeps between stages, built when first asked for: the live "policy", the "sandbox" pool.

    Example:
        with Session() as session:
            pool = session.get("sandbox", lambda: open_pool(config.sandbox, ...))
    """

    def __init__(self) -> None:
        self._items: dict[str, Any] = {}

    def get(self, name: str, builder: Callable[[], Built]) -> Built:
        """The item of that name, from `builder` the first time."""
        if name not in self._items:
            self._items[name] = builder()
        item: Built = self._items[name]
        return item

    def find(self, name: str) -> Any:
        """The item of that name, None where nobody has asked for it yet."""
        return self._items.get(name)

    def drop(self, name: str) -> None:
        """Closes and forgets one item, if it is there."""
        close(self._items.pop(name, None))

    def close(self) -> None:
        """Closes every item, the last one built first; the first error is raised after all have been tried."""
        errors: list[Exception] = []
        while self._items:
            _, item = self._items.popitem()
            try:
                close(item)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def close(item: object) -> None:
    method = getattr(item, "close", None)
    if callable(method):
        method()


@dataclass
class StageContext:
    """Everything a stage works with. It writes files into `out` and nothing else, and reads through `input` only.

    Rows added to `timings` (what, seconds, num_tokens, tokens_per_s, peak_bytes; all but `what` optional) are written
    to timings.parquet, the one file that is not part of the stage's content.
    """

    run: RunDir
    config: RunConfig
    stage: StageId
    out: Path
    session: Session
    report: Report = silent
    key: str = ""
    upstream: tuple[StageId, ...] = ()
    timings: list[dict[str, Any]] = field(default_factory=list)

    def input(self, stage: StageId) -> Path:
        """The folder of a finished stage that this one reads. Only what its key is made of may be read."""
        assert stage in self.upstream, f"{self.stage} reads {stage}, not in its key: see artifacts/keys.py"
        return self.run.folder(stage)

    def inputs(self, name: str) -> Iterable[StageId]:
        """The stages called `name` that this one reads."""
        return [stage for stage in self.upstream if stage.name == name]

    def journal(self, name: str) -> Journal:
        """This stage's journal of finished work; what a killed try appended is in it."""
        return Journal(self.out / (name + SUFFIX))

    def labels(self) -> dict[str, str]:
        """Labels for the containers of this stage; the run's label alone is what a start reaps by."""
        return {**self.run.labels(), "flexsink.stage": str(self.stage), "flexsink.key": self.key}

    def progress(self, done: int, total: int, unit: str = "", **fields: float | str) -> None:
        """Says how far the stage is."""
        self.report(Progress(str(self.stage), done, total, unit, fields))
