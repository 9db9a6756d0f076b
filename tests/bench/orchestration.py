"""What Prefect adds to a stage: 20 empty stages as tasks of one flow run, on a running server, in this process.

    .venv/bin/python -m tests.bench.orchestration [--out FILE]

A stage writes an empty file and so costs what every stage costs: its key, the sha256 of its input, fsync, manifest,
rename. The same stages are run without Prefect; the difference is Prefect's. Progress artifacts are left out.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES = 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.orchestration")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--server", default="", help="address of a running server (one is started)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        body = measure(Path(folder), args.server)
    text = json.dumps(body, indent=1, sort_keys=True)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def measure(folder: Path, url: str) -> dict[str, Any]:
    """Medians in milliseconds over the stages, and what they were measured on."""
    from flows import server

    own = not url
    (folder / "server").mkdir()
    url = url or server.start(folder / "server")
    try:
        os.environ["PREFECT_API_URL"] = url
        server.connect(lambda text: None)
        from prefect.logging.handlers import APILogHandler

        with_prefect, whole = stages_in_prefect(folder / "in-prefect")
        alone = stages_alone(folder / "alone")
        APILogHandler().flush()  # of what every handler was given, while there is a server to take it
    finally:
        if own:
            server.stop(folder / "server")
    import prefect

    return {
        "stages": STAGES,
        "with_prefect_ms": round(1e3 * statistics.median(with_prefect), 1),
        "with_prefect_max_ms": round(1e3 * max(with_prefect), 1),
        "without_prefect_ms": round(1e3 * statistics.median(alone), 1),
        "added_ms": round(1e3 * (statistics.median(with_prefect) - statistics.median(alone)), 1),
        "flow_run_s": round(whole, 2),
        "prefect": prefect.__version__,
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "load_1_min": round(os.getloadavg()[0], 1),
        "command": "python -m tests.bench.orchestration",
    }


def opened(folder: Path) -> tuple[Any, Any, list[Any]]:
    """A run, and its stages: load, then one rollout over and over."""
    from flows.config import resolved
    from flows.presets import preset
    from stages.artifacts import RunDir, StageId

    install()
    config = resolved(preset("tiny_test"))
    stages = [StageId("load"), *(StageId("rollout", 0) for _ in range(STAGES))]
    return RunDir.create(folder, config), config, stages


def install() -> None:
    """Puts empty stages where the flow looks for stages."""
    import types

    def run(context: Any) -> None:
        (context.out / "empty").write_text("")

    for name in ("load", "rollout"):
        module = types.ModuleType(f"stages.{name}")
        module.run = run  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module


def timed(run: Any, stages: list[Any], step: Callable[[Any], object]) -> list[float]:
    """Seconds of each stage but the first; the folder is removed in between, so that each one runs."""
    import shutil

    seconds = []
    for stage in stages:
        shutil.rmtree(run.folder(stage), ignore_errors=True)
        started = time.perf_counter()
        step(stage)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def stages_in_prefect(folder: Path) -> tuple[list[float], float]:
    from flows import steps
    from flows.progress import Lines
    from stages.artifacts import Session

    run, config, stages = opened(folder)
    seconds: list[float] = []
    with open(os.devnull, "w") as nowhere, Session() as session, Lines(nowhere) as view:
        step = steps.prefect(run, config, session, view)
        started = time.perf_counter()
        steps.in_flow(run, config, view, lambda: seconds.extend(timed(run, stages, step)))
    return seconds, time.perf_counter() - started


def stages_alone(folder: Path) -> list[float]:
    from flows import steps
    from flows.progress import Lines
    from stages.artifacts import Session

    run, config, stages = opened(folder)
    with open(os.devnull, "w") as nowhere, Session() as session, Lines(nowhere) as view:
        return timed(run, stages, steps.local(run, config, session, view))


if __name__ == "__main__":
    main()
