"""Training on a schedule: `flexsink serve PRESET --cron "0 3 * * *"` starts a new run each time, one at a time.

The schedule lives as long as the command does. A scheduled run is the same loop as `flexsink train`'s, in a process of
its own; a retry of it in Prefect's UI goes on in the folder it began in.
"""

import asyncio
import contextlib
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
from prefect.runtime import flow_run
from prefect.types.entrypoint import EntrypointType

from flows import server, steps
from flows.config import overridden, resolved
from flows.presets import preset
from flows.progress import Lines
from flows.train import loop
from stages.artifacts import RunDir, Session
from stages.config import UserError

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
POLL_S = 1.0


def serve(name: str, overrides: Sequence[str], *, cron: str, stop_after_runs: int, note: Callable[[str], None]) -> None:
    """Serves until it is interrupted, or until that many scheduled runs have ended (0: no limit).

    This module imports Prefect: call flows.server.connect before importing it.
    """
    resolved(overridden(preset(name), overrides))  # a mistake shows now, not at night
    check_cron(cron)
    server.quiet()
    note(f"serving {name} at {cron!r}, one run at a time; end it with Ctrl-C")
    asyncio.run(serving(name, list(overrides), cron, stop_after_runs))


async def serving(name: str, overrides: list[str], cron: str, stop_after_runs: int) -> None:
    runner = Runner(name=f"flexsink-{name}", limit=1, pause_on_shutdown=True)
    deployment = await runner.aadd_flow(
        scheduled,
        name=f"flexsink-{name}",
        cron=cron,
        parameters={"preset_name": name, "overrides": overrides, "root": str(Path.cwd())},
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    work = asyncio.create_task(runner.start())
    try:
        if stop_after_runs:
            watch = asyncio.create_task(ended(runner, deployment, stop_after_runs))
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


async def ended(runner: Runner, deployment: Any, count: int) -> None:
    """Returns once `count` more runs of the deployment have ended and their processes are gone; no other run begins."""
    of = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    async with get_client() as client:

        async def number(*states: str) -> int:
            types = FlowRunFilterStateType(any_=[StateType(each) for each in states])
            wanted = FlowRunFilter(state=FlowRunFilterState(type=types))
            return len(await client.read_flow_runs(deployment_filter=of, flow_run_filter=wanted))

        before = await number(*FINAL)
        while await number("RUNNING", *FINAL) < before + count:
            await asyncio.sleep(POLL_S)
        await client.pause_deployment(deployment)
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
def scheduled(preset_name: str, overrides: list[str], root: str) -> None:
    server.quiet()
    run = run_of(str(flow_run.id), Path(root, "data/runs"))
    if run is None:
        config = resolved(overridden(preset(preset_name), overrides))
        run = RunDir.create(steps.default_path(Path(root, "data/runs"), preset_name), config)
    config = run.config()
    with run.lock(), Session() as session, Lines() as view, steps.logging_to(run, config.logging.level):
        steps.reap(run)
        server.crash_leftovers(run, but=str(flow_run.id))
        steps.inside_flow(run, lambda: loop(config, steps.prefect(run, config, session, view)))


def run_of(flow_run_id: str, runs: Path) -> RunDir | None:
    """The run that this flow run began, when it is a retry."""
    for path in runs.glob("*/logs/flow_runs.txt"):
        run = RunDir(path.parent.parent)
        if flow_run_id in server.remembered(run):
            return run
    return None
