"""A score in containers, of a synthetic run; what a run has of Docker. For tests with real Docker."""

import io
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from flows import containers, steps
from flows.config import resolved
from flows.progress import Lines
from stages.artifacts import Manifest, RunDir, Session, StageId
from stages.config import RunConfig, replace
from stages.sandbox.image import connect
from tests import synthetic_run

SCORE = StageId("score", 0)


def config_of(*, prompts: int = 2, group_size: int = 8, **settings: Any) -> RunConfig:
    config = synthetic_run.config_of(iterations=1, prompts=prompts, group_size=group_size, programs=2)
    config = replace(config, "sandbox", cpu_s=settings.pop("cpu_s", 2.0), containers=settings.pop("sandboxes", 2))
    return resolved(replace(config, "steps", runner="docker", **settings))


def rolled_out(path: Path, config: RunConfig, *, endless: bool = False) -> RunDir:
    """A run whose first rollout is done, of programs that are mostly honest; endless: some use up their time."""
    broken = {name: each for name, each in synthetic_run.BROKEN.items() if endless or name != "timeout"}
    with mock.patch.object(synthetic_run, "BROKEN", broken):
        return synthetic_run.write(path, config, upto=StageId("rollout", 0))


def make(run: RunDir, config: RunConfig, stage: StageId = SCORE) -> Manifest:
    """The stage's manifest, made by the configured runner."""
    with Session() as session:
        return steps.run_stage(run, config, stage, session, Lines(io.StringIO()))


def in_process(run: RunDir, path: Path, config: RunConfig) -> Manifest:
    """The manifest of the same score stage made in this process, of a copy."""
    subprocess.run(["cp", "-r", str(run.path), str(path)], check=True)
    return make(RunDir(path), replace(config, "steps", runner="process"))


def of_run(run: RunDir, kind: str = "") -> list[dict[str, Any]]:
    """The run's containers as the daemon lists them; kind: sandbox, score or gpu."""
    client = connect()
    wanted = [f"flexsink.run={run.labels()['flexsink.run']}"]
    if kind:
        wanted.append("flexsink.sandbox" if kind == "sandbox" else f"{containers.LABEL}={kind}")
    found: list[dict[str, Any]] = client.containers(all=True, filters={"label": wanted})
    client.close()
    return found


def volumes(run: RunDir) -> list[str]:
    client = connect()
    label = f"flexsink.run={run.labels()['flexsink.run']}"
    found = [each["Name"] for each in client.volumes(filters={"label": label})["Volumes"] or ()]
    client.close()
    return found


def wait_for(true: Callable[[], Any], seconds: float = 300.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return value
