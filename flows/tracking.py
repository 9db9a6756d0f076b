"""What a tracker is told of a run, where `logging.tracker` names one: the figures of its iterations and evaluations.

All are reached through accelerate, which the project needs anyway: its trackers have one interface for TensorBoard,
Weights & Biases and others; what Prometheus reads is written behind the same interface. The tracker's own package is
the user's to install. Each stage is told once over all starts of a run; a tracker that
fails is logged and never fails a run.
"""

import contextlib
import importlib.util
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flows.progress import View, Views
from flows.summary import policy_row
from stages.artifacts import Progress, RunDir, StageId
from stages.config import RunConfig, UserError

# tracker -> the packages that it needs, any one of which will do; the first is named in the hint
PACKAGES: dict[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboardX", "tensorboard"),
    "wandb": ("wandb",),
    "prometheus": ("prometheus_client",),
}

log = logging.getLogger("flows.tracking")


@contextlib.contextmanager
def tracked(run: RunDir, config: RunConfig, view: View) -> Iterator[View]:
    """`view`, and beside it the tracker that `config` asks for. UserError where its package is missing."""
    name = config.logging.tracker
    if name == "none":
        yield view
        return
    if not any(map(importlib.util.find_spec, PACKAGES[name])):
        wanted = PACKAGES[name][0]
        raise UserError(f"logging.tracker={name} needs the package {wanted}", f"pip install {wanted}")
    tracking = Tracking(run, config, started(name, run, config))
    try:
        yield Views([view, tracking])
    finally:
        tracking.tell(tracking.tracker.finish)


def started(name: str, run: RunDir, config: RunConfig) -> Any:
    """An accelerate tracker at work."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    os.environ.setdefault("WANDB_CONSOLE", "off")  # the terminal is the progress's
    PartialState(cpu=True)  # its trackers log through it; no device is touched
    tracker = prometheus(run) if name == "prometheus" else LOGGER_TYPE_TO_CLASS[name](**SETTINGS[name](run))
    try:
        tracker.start()
    except Exception as error:
        # Whatever the tracker's package raises: no account, no server, a version of its own.
        hint = f"see that {name} works here, or go on with logging.tracker=none"
        raise UserError(f"{name} does not start: {str(error) or type(error).__name__}", hint) from error
    return tracker


SETTINGS: dict[str, Callable[[RunDir], dict[str, Any]]] = {
    # logs/tensorboard/<name of the run>: a file for each start, which TensorBoard reads as one
    "tensorboard": lambda run: {
        "run_name": run.path.name,
        "logging_dir": run.logs / "tensorboard",
        "filename_suffix": f".{time.time_ns()}",
    },
    # a project called flexsink; the id makes a resumed run go on there too
    "wandb": lambda run: {
        "run_name": "flexsink",
        "name": run.path.name,
        "id": re.sub(r"[^A-Za-z0-9_-]", "-", run.labels()["flexsink.run"])[-64:],
        "resume": "allow",
        "config": run.config().flat(),
        "dir": str(run.logs),
    },
}


class Tracking:
    """A view that tells the tracker. What it has told is kept in logs/tracked-<tracker>.txt."""

    def __init__(self, run: RunDir, config: RunConfig, tracker: Any) -> None:
        self.run, self.tracker = run, tracker
        self.ledger = run.logs / f"tracked-{config.logging.tracker}.txt"
        self.told = set(self.ledger.read_text().splitlines()) if self.ledger.exists() else set()

    def expect(self, stages: Sequence[StageId]) -> None:
        pass

    def start(self, stage: StageId) -> None:
        pass

    def report(self, progress: Progress) -> None:
        pass

    def finish(self, stage: StageId, *, seconds: float, reused: bool) -> None:
        if str(stage) not in self.told and self.tell(lambda: self.log(stage)):
            self.told.add(str(stage))
            self.tell(lambda: self.note(stage), failed="what the tracker was told is not noted")

    def note(self, stage: StageId) -> None:
        with open(self.ledger, "a") as file:
            file.write(f"{stage}\n")

    def log(self, stage: StageId) -> None:
        values = figures_of(self.run, stage)
        if values:
            self.tracker.log(values, step=stage.index)

    def tell(self, action: Any, *, failed: str = "the tracker was not told") -> bool:
        try:
            action()
        except Exception as error:
            # The tracker is another program's code, often with a network behind it; and a disk may be full.
            log.warning("%s: %s", failed, error)
            return False
        return True


def figures_of(run: RunDir, stage: StageId) -> dict[str, float]:
    """What is worth a curve of a finished stage, by names with a slash; empty for load, rollout, score and export.

    Example: {"reward/mean": 2.9, "outcome/ok": 41, "update/loss": 0.01, "speed/rollout": 5100.0}
    """
    from stages.artifacts import history
    from stages.tasks import registry

    index = stage.index or 0
    if stage.name == "update":
        iteration = history.summed_up(run, index)
        return {
            "reward/mean": iteration.reward,
            "reward/spread": iteration.spread,
            "groups/silent": iteration.silent_groups,
            "completion/tokens": iteration.tokens,
            "completion/truncated": iteration.truncated,
            **{f"outcome/{name}": count for name, count in iteration.outcomes.items()},
            **{f"update/{name}": value for name, value in iteration.metrics.items()},
            **speeds(run, index),
        }
    if stage.name == "evaluate":
        row = policy_row(run, index) or {}
        names = [figure.name for figure in registry.of(run.config()).figures]
        return {f"evaluate/{name}": row[name] for name in names if row.get(name) is not None}
    return {}


def speeds(run: RunDir, index: int) -> dict[str, float]:
    """Seconds of the iteration's stages and the tokens a second of those that know them."""
    from stages.artifacts.manifest import TIMINGS
    from stages.artifacts.parquet import read_table

    found = {}
    for name in ("rollout", "score", "update"):
        folder = run.folder(StageId(name, index))
        if not (folder / TIMINGS).is_file():
            continue
        for row in read_table(folder, "timings").to_pylist():
            if row["what"] == "stage":
                found[f"seconds/{name}"] = row["seconds"]
            elif row.get("tokens_per_s") is not None:
                found[f"tokens_per_s/{name}"] = row["tokens_per_s"]
    return found


def prometheus(run: RunDir) -> Any:
    """A tracker that keeps logs/metrics.prom, for the textfile collector of Prometheus' node exporter."""
    from accelerate.tracking import GeneralTracker
    from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

    class Prometheus(GeneralTracker):
        name = "prometheus"
        requires_logging_directory = False

        def __init__(self, path: Path, label: str) -> None:
            self.path, self.label = path, label
            self.tracker = CollectorRegistry()
            self.gauges: dict[str, Any] = {}
            super().__init__()

        def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
            for name, value in {**values, "step": step or 0}.items():
                metric = "flexsink_" + name.replace("/", "_")
                if metric not in self.gauges:
                    self.gauges[metric] = Gauge(metric, f"{name} of the last step", ["run"], registry=self.tracker)
                self.gauges[metric].labels(self.label).set(value)
            write_to_textfile(os.fspath(self.path), self.tracker)

    return Prometheus(run.logs / "metrics.prom", run.path.name)
