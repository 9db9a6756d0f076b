"""Training on a schedule: `flexsink serve PRESET --cron "0 3 * * *"`, or a deployment of containers/prefect.yaml.

Each tick is the same loop as `flexsink train`'s, in a process of its own. It goes on with the newest run that an
earlier tick of the same schedule left unfinished, whatever ended that one; where there is none it starts a new run. A
retry in Prefect's UI goes on in the folder it began in. Where another run has the GPU, a tick waits.

`serve`'s schedule lives as long as the command does; ticks that find all its places taken follow one another later.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.runner import Runner
from prefect.runtime import deployment, flow_run
from prefect.types.entrypoint import EntrypointType

from flows import server, steps
from flows.config import continues, overridden, resolved
from flows.presets import preset
from flows.progress import Views, plain
from flows.summary import finish
from flows.train import go_on, stages_of, working
from stages.artifacts import RunDir
from stages.artifacts.run import write_json
from stages.config import RunConfig, UserError, canonical_json

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
POLL_S = 1.0
OF_SCHEDULE = "logs/schedule.json"

log = logging.getLogger("flows.schedule")


def serve(
    name: str, overrides: Sequence[str], *, cron: str, limit: int, stop_after_runs: int, note: Callable[[str], None]
) -> None:
    """Serves until it is interrupted, or until that many scheduled runs have ended (0: no end).

    limit: runs at the same time

    This module imports Prefect: call flows.server.connect before importing it.
    """
    resolved(overridden(preset(name), overrides))  # a mistake shows now, not at night
    check_cron(cron)
    if limit < 1:
        raise UserError(f"--limit is {limit}", "at least 1 run at a time")
    server.quiet()
    note(f"serving {name} at {cron!r}, {limit} at a time; end it with Ctrl-C")
    with server.answering(os.environ["PREFECT_API_URL"], "start it, then serve again: a tick goes on with the rest"):
        asyncio.run(serving(name, list(overrides), cron, limit, stop_after_runs))


async def serving(name: str, overrides: list[str], cron: str, limit: int, stop_after_runs: int) -> None:
    root = str(Path.cwd())
    called = deployment_name(name, overrides, "" if server.is_own(os.environ.get("PREFECT_API_URL", "")) else root)
    runner = Runner(name=called, limit=limit, pause_on_shutdown=True)
    served = await runner.aadd_flow(
        scheduled,
        name=called,
        cron=cron,
        parameters={"preset_name": name, "overrides": overrides, "root": root},
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    work = asyncio.create_task(runner.start())
    try:
        if stop_after_runs:
            watch = asyncio.create_task(ended(runner, served, stop_after_runs))
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()  # raises what went wrong in it
                await runner.astop()
            watch.cancel()
        await work
    finally:
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work


def deployment_name(name: str, overrides: Sequence[str], root: str) -> str:
    """What Prefect knows a schedule by: no two schedules of one server that differ have the same.

    root: the folder that data/runs is in; empty on the project's own server, which has no other.

    Example: deployment_name("tiny", ["train.seed=1"], "") is "flexsink-tiny-1aaef90b"
    """
    if not overrides and not root:
        return f"flexsink-{name}"
    digest = hashlib.sha256(canonical_json([root, list(overrides)]).encode()).hexdigest()
    return f"flexsink-{name}-{digest[:8]}"


async def ended(runner: Runner, served: Any, count: int) -> None:
    """Returns once `count` more runs of the deployment have ended and their processes are gone; no other run begins."""
    of = DeploymentFilter(id=DeploymentFilterId(any_=[served]))
    async with get_client() as client:

        async def number(*states: str) -> int:
            types = FlowRunFilterStateType(any_=[StateType(each) for each in states])
            wanted = FlowRunFilter(state=FlowRunFilterState(type=types))
            # Reading them instead would stop at 200, which a deployment has had after a while.
            return await client.count_flow_runs(deployment_filter=of, flow_run_filter=wanted)

        before = await number(*FINAL)
        while await number("RUNNING", *FINAL) < before + count:
            await asyncio.sleep(POLL_S)
        await client.pause_deployment(served)
        # A run ends in Prefect before its process does; a runner stopped in between would call it cancelled.
        while await number(*FINAL) < before + count or not runner.has_slots_available():
            await asyncio.sleep(POLL_S)


def check_cron(cron: str) -> None:
    try:
        CronSchedule(cron=cron)
    except ValueError:
        hint = 'for example --cron "0 3 * * *" for every night at three'
        raise UserError(f"{cron!r} is not a cron schedule", hint) from None


@flow(name="flexsink scheduled", flow_run_name="{preset_name}", persist_result=False, retries=0)
def scheduled(preset_name: str, overrides: list[str] | None = None, root: str = "") -> None:
    """One tick. root: the folder that data/runs is in; the process's own when it is empty."""
    server.quiet()
    own, runs = str(flow_run.id), Path(root, "data/runs")
    wanted = resolved(overridden(preset(preset_name), overrides or []))
    run = run_of(own, runs) or left_unfinished(wanted, runs) or fresh(wanted, runs)
    config = wanted if continues(run.config(), wanted) else run.config()
    steps.check_runner(config, log.info)
    with plain(config.logging.format) as view, working(run, config, view, wait=log.warning) as work:
        server.rename(own, run.path.name)
        server.crash_leftovers(run, but=own)
        shown = work._replace(view=Views([work.view, steps.Artifacts(run)]))
        steps.inside_flow(run, lambda: go_on(run, config, shown, steps.prefect))
        finish(run, view.note)


def run_of(flow_run_id: str, runs: Path) -> RunDir | None:
    """The run that this flow run began, when it is a retry."""
    for path in runs.glob("*/logs/flow_runs.txt"):
        run = RunDir(path.parent.parent)
        if flow_run_id in server.remembered(run):
            return run
    return None


def left_unfinished(wanted: RunConfig, runs: Path) -> RunDir | None:
    """The newest run of this schedule that a tick of today's configuration can go on with and nobody works on."""
    paths = [path.parent.parent for path in runs.glob(f"*/{OF_SCHEDULE}")]
    for path in sorted(paths, key=lambda each: each.stat().st_mtime, reverse=True):
        run = RunDir(path)
        if schedule_of(run) != str(deployment.name) or not (path / "config.json").exists():
            continue
        try:
            config = run.config()
            # As the run itself was told: a schedule that now trains longer does not take up what was done.
            unfinished = any(run.manifest(stage) is None for stage in stages_of(config))
            if unfinished and continues(config, wanted) and not run.is_busy():
                return run
        except UserError as error:
            log.warning("%s is passed over: %s", path, error.message)
    return None


def fresh(wanted: RunConfig, runs: Path) -> RunDir:
    """A new run, marked as this schedule's."""
    run = RunDir.create(steps.default_path(runs, wanted.preset), wanted)
    write_json(run.path / OF_SCHEDULE, {"deployment": str(deployment.name)})
    return run


def schedule_of(run: RunDir) -> str:
    try:
        return str(json.loads((run.path / OF_SCHEDULE).read_text())["deployment"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
