"""A stage as a step of the flow: run in this process, and shown in Prefect as a task.

Prefect schedules and shows; whether a stage has to run is decided on disk by stages.artifacts.execute alone. So a task
has no cache and no retries, and returns a reference to the manifest. Prefect is imported where it is first needed.
"""

import contextlib
import datetime
import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flows import server
from flows.progress import Clock, JsonFormatter, Lines, View, described
from flows.summary import Summary, reward_rows
from stages.artifacts import Manifest, Progress, RunDir, Session, StageContext, StageId, execute, look
from stages.artifacts.run import explained
from stages.config import LoggingConfig, RunConfig, pasteable

Reference = dict[str, str]
# {"stage": "rollout 3", "folder": "iterations/00003/rollout", "digest": sha256 of the content}
Step = Callable[[StageId], Reference]

log = logging.getLogger("flows")


def stage_function(name: str) -> Callable[[StageContext], None]:
    """stages.<name>.run, its imports kept from drawing bars and notes of their own over the progress."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    function: Callable[[StageContext], None] = importlib.import_module(f"stages.{name}").run
    return function


def run_stage(run: RunDir, config: RunConfig, stage: StageId, session: Session, view: View) -> Manifest:
    """The stage's manifest, made or found; `view` is told what happens."""
    ran = False

    def function(context: StageContext) -> None:
        nonlocal ran
        ran = True
        view.start(stage)
        stage_function(stage.name)(context)

    started = time.perf_counter()
    if config.steps.runner == "docker":
        manifest, ran = in_container(run, config, stage, session, view)
    else:
        manifest = execute(run, config, stage, function, session, view.report)
    seconds = time.perf_counter() - started
    log.info("%s: %s in %.1f s, content %s", stage, "done" if ran else "reused", seconds, manifest.digest[:12])
    view.finish(stage, seconds=seconds, reused=not ran)
    return manifest


def in_container(run: RunDir, config: RunConfig, stage: StageId, session: Session, view: View) -> tuple[Manifest, bool]:
    """The stage's manifest and whether it had to be made: by the session's containers, which decide as execute does."""
    from flows.containers import Crew

    decision = look(run, config, stage)
    if decision.manifest is not None:
        return decision.manifest, False
    view.start(stage)
    crew = session.get("crew", lambda: Crew(run, config, log.info))
    crew.make(config, stage, decision.key, view.report)
    manifest = run.manifest(stage)
    assert manifest is not None, f"the container of {stage} wrote no manifest"
    assert manifest.key == decision.key, f"the container of {stage} made it under another key"
    return manifest, True


def local(run: RunDir, config: RunConfig, session: Session, view: View) -> Step:
    """A step in this process, without Prefect."""

    def step(stage: StageId) -> Reference:
        manifest = run_stage(run, config, stage, session, view)
        return {"stage": str(stage), "folder": str(stage.folder), "digest": manifest.digest}

    return step


def prefect(run: RunDir, config: RunConfig, session: Session, view: View) -> Step:
    """The same step as a Prefect task of the flow run at work."""
    from prefect import task
    from prefect.cache_policies import NO_CACHE

    inner = local(run, config, session, view)

    def step(stage: StageId) -> Reference:
        # Parameters are shown in the UI and are plain text: a live object here would be walked through by Prefect.
        @task(name=stage.name, task_run_name=str(stage), cache_policy=NO_CACHE, persist_result=False, retries=0)
        def run_step(folder: str) -> Reference:
            return inner(stage)

        reference: Reference = run_step(str(stage.folder))
        return reference

    return step


class Artifacts:
    """Prefect's view of a run, which never fails it: how far the run and each stage are, a table of rewards."""

    UPDATE_EVERY_S = 2.0
    # an update costs 7-24 ms

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.prefix = run.labels()["flexsink.run"][:8].lower()
        self.artifact: Any = None
        self.whole: Any = None
        self.clock = Clock()
        self.last = Progress("", 0, 0)
        self.next_update = 0.0
        self.next_whole = 0.0

    def expect(self, stages: Sequence[StageId]) -> None:
        from prefect.artifacts import create_progress_artifact

        self.clock = Clock(stages)
        key = f"{self.prefix}-run"
        self.whole = shown(lambda: create_progress_artifact(progress=0.0, key=key, description=self.run.path.name))

    def start(self, stage: StageId) -> None:
        from prefect.artifacts import create_progress_artifact

        key = f"{self.prefix}-{stage}".replace(" ", "-").replace("_", "-")
        self.last = Progress(str(stage), 0, 0)
        self.artifact = shown(lambda: create_progress_artifact(progress=0.0, key=key, description=str(stage)))
        self.next_update = time.monotonic() + self.UPDATE_EVERY_S
        self.clock.start()

    def report(self, progress: Progress) -> None:
        self.last = progress
        self.clock.report(progress)
        if self.artifact is not None and progress.total and time.monotonic() >= self.next_update:
            self.update(self.artifact, 100.0 * progress.done / progress.total, described(progress))
            self.next_update = time.monotonic() + self.UPDATE_EVERY_S

    def finish(self, stage: StageId, *, seconds: float, reused: bool) -> None:
        from prefect.artifacts import create_table_artifact

        self.clock.finish(stage, seconds=seconds, reused=reused)
        if self.whole is not None and (time.monotonic() >= self.next_whole or not self.clock.remaining):
            percent = 100.0 * self.clock.done / self.clock.total
            self.update(self.whole, percent, f"{self.run.path.name}: {self.clock.text() or stage}")
            self.next_whole = time.monotonic() + self.UPDATE_EVERY_S
        if reused:
            return
        if self.artifact is not None:
            self.update(self.artifact, 100.0, described(self.last))
            self.artifact = None
        if stage.name == "update":
            rows = reward_rows(self.run)
            key = f"{self.prefix}-rewards"
            shown(lambda: create_table_artifact(table=rows, key=key, description="mean reward per iteration"))

    def update(self, artifact: Any, percent: float, text: str) -> None:
        from prefect.artifacts import update_progress_artifact

        shown(lambda: update_progress_artifact(artifact, progress=percent, description=text))


def shown(action: Callable[[], Any]) -> Any:
    """What `action` returns; None, with a line in the log, when Prefect could not be told."""
    try:
        return action()
    except Exception as error:
        # Any failure of the network or of the server's answer; the disk is the truth, showing it is not.
        log.warning("Prefect was not told: %s", error)
        return None


def in_flow(run: RunDir, config: RunConfig, view: Lines, body: Callable[[], None]) -> None:
    """Calls `body` inside a Prefect flow run named after the run directory."""
    url = server.connect(view.note)
    from prefect import flow

    server.quiet()

    @flow(name="flexsink train", flow_run_name=run.path.name, persist_result=False, retries=0)
    def train_run(run_dir: str, config: dict[str, Any]) -> None:
        inside_flow(run, body)

    with server.answering(url, f"what was finished is kept; go on with: {pasteable('flexsink', 'resume', run.path)}"):
        server.crash_leftovers(run)
        train_run(str(run.path), config.to_dict())


def inside_flow(run: RunDir, body: Callable[[], None]) -> None:
    """`body` with this flow run's id kept in the run directory and a summary shown at its end."""
    from prefect.artifacts import create_markdown_artifact
    from prefect.runtime import flow_run

    server.remember(run, str(flow_run.id))
    body()
    key = f"{run.labels()['flexsink.run'][:8].lower()}-summary"
    shown(lambda: create_markdown_artifact(markdown=Summary.of(run).markdown(), key=key, description=run.path.name))


def reap(run: RunDir) -> None:
    """Removes the containers that a killed start of this run left. UserError without the Docker they are in."""
    config = run.config()
    if config.sandbox.backend != "docker" and config.steps.runner != "docker":
        return
    from flows.containers import reap as reap_containers

    removed = reap_containers(run.labels())
    if removed:
        log.info("removed %d containers that an earlier start left", removed)


def check_sandbox(backend: str) -> None:
    """Returns when programs can be judged here: by a daemon with the image, or within local's walls; UserError else."""
    from stages.sandbox import image, local

    if backend == "local":
        local.find_walls()
        return
    client = image.connect()
    try:
        image.require_image(client)
    finally:
        client.close()


def check_runner(config: RunConfig, note: Callable[[str], None]) -> None:
    """Returns when stages can run where the configuration says; their images are built where they are missing."""
    if config.steps.runner == "docker":
        from flows import images
        from stages.sandbox.image import connect

        client = connect()
        try:
            for kind in images.KINDS:
                images.require(client, kind, note, task=config.task.name)
        finally:
            client.close()


def default_path(runs: Path, preset: str) -> Path:
    """A new folder data/runs/<preset>-<UTC>, a number behind it where that is taken."""
    name = f"{preset}-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}"
    path, number = runs / name, 1
    with explained(runs):
        runs.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(FileExistsError):
                path.mkdir()  # of two that ask in one second, one gets it
                return path
            path, number = runs / f"{name}-{number}", number + 1


class RunLog(logging.FileHandler):
    """A log file whose failures, a full disk above all, neither end the run nor fill the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def logging_to(run: RunDir, config: LoggingConfig) -> Iterator[None]:
    """Sends what is logged, Python's warnings too, to logs/flexsink.log of the run and not to the terminal."""
    with explained(run.path):
        run.logs.mkdir(parents=True, exist_ok=True)
        handler = RunLog(run.logs / "flexsink.log")
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if config.format == "json" else plain)
    handler.setLevel(config.level)
    root = logging.getLogger()
    root.addHandler(handler)
    for name in ("flows", "stages"):
        logging.getLogger(name).setLevel(config.level)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        handler.close()
