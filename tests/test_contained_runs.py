"""What a run in containers leaves behind when killed or interrupted, and that it ends with the bytes of a quiet one.

FLEXSINK_KILLS says how often the run on the bundled model is killed (3); FLEXSINK_KILL_SEED repeats a failing choice of
moments.
"""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import containers, images, steps
from flows.config import overridden, resolved
from flows.presets import preset
from flows.progress import Lines
from flows.train import loop, stages_of
from stages.artifacts import RunDir, Session
from stages.sandbox.image import connect
from tests.contained import config_of, of_run, rolled_out, volumes, wait_for
from tests.patience import PATIENCE_S
from tests.test_resume import Flow, below, journal_at_work

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("stage_images")]

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("FLEXSINK_KILLS", "3"))

LIVING = """
import sys
from pathlib import Path
from stages.artifacts import RunDir
from stages.exits import guarded
from tests.contained import make
run = RunDir(Path(sys.argv[1]))
sys.exit(guarded(lambda: bool(make(run, run.config()))))
"""


def living(run: RunDir) -> "subprocess.Popen[bytes]":
    """A process in the middle of the run's score."""
    process = subprocess.Popen([sys.executable, "-c", LIVING, str(run.path)], cwd=ROOT, start_new_session=True)
    wait_for(lambda: below(run.path, "verdicts.journal"))
    assert {each["State"] for each in of_run(run)} >= {"running"}
    return process


def started(run: RunDir) -> list[dict[str, Any]]:
    """The run's containers but those that a kill between making and starting left: they hold nothing, and go with the
    next start."""
    return [each for each in of_run(run) if each["State"] != "created"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_container_and_no_volume(tmp_path: Path, number: signal.Signals) -> None:
    run = rolled_out(tmp_path / "run", config_of(prompts=16, group_size=16))
    process = living(run)
    os.kill(process.pid, number)
    assert process.wait(PATIENCE_S) == 130
    assert (of_run(run), volumes(run)) == ([], [])


def test_containers_end_with_a_killed_process_and_the_next_start_removes_what_is_left(tmp_path: Path) -> None:
    config = config_of(prompts=16, group_size=16)
    run = rolled_out(tmp_path / "run", config)
    process = living(run)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not started(run))
    assert len(volumes(run)) == 1
    client = connect()
    left = client.create_container(images.image_name("score"), labels={**run.labels(), containers.LABEL: "gpu"})
    other = client.create_container(images.image_name("score"), labels={"flexsink.run": f"test-another-{os.getpid()}"})
    steps.reap(run)
    assert (of_run(run), volumes(run)) == ([], [])
    with pytest.raises(Exception, match="No such container"):
        client.inspect_container(left["Id"])
    (listed,) = client.containers(all=True, filters={"id": other["Id"]})  # somebody may be about to start it
    client.remove_container(other["Id"])
    client.close()
    made = listed["Created"]
    assert containers.abandoned([listed], now=made + containers.UNSTARTED_S - 1) == []
    assert containers.abandoned([listed], now=made + containers.UNSTARTED_S + 1) == [listed]


SMALL = ("train.iterations=1", "rollout.prompts=1", "rollout.group_size=4", "rollout.max_new_tokens=96")
SMALL += ("evaluate.programs=4", "evaluate.games=1", "export.format=adapter")
OVERRIDES = SMALL if KILLS <= 3 else ()


def whole(path: Path, runner: str, *overrides: str) -> RunDir:
    """A whole run on the bundled model, without Prefect."""
    config = resolved(overridden(preset("tiny_test"), [*overrides, f"steps.runner={runner}"]))
    run = RunDir.create(path, config)
    with Session() as session, steps.logging_to(run, config.logging):
        loop(config, steps.local(run, config, session, Lines(io.StringIO())))
    return run


def contents(run: RunDir) -> dict[str, str]:
    """The content digest of every stage that is done."""
    paths = (path for path in below(run.path, "manifest.json") if ".tmp" not in str(path) and ".stale" not in str(path))
    return {str(path.parent.relative_to(run.path)): json.loads(path.read_text())["digest"] for path in paths}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run in this process that nothing disturbed."""
    return whole(tmp_path_factory.mktemp("quiet") / "run", "process", *OVERRIDES)


@contextlib.contextmanager
def created() -> Iterator[list[dict[str, str]]]:
    """The labels of every container that is made meanwhile, all of them there at the end.

    Heard as it happens: of what is past, the daemon keeps the last 256 events, of all that it does.
    """
    seen: list[dict[str, str]] = []
    client, own = connect(), connect(timeout=None)
    events = own.events(since=int(time.time()), filters={"event": "create", "type": "container"}, decode=True)
    last = f"test-last-{os.getpid()}"

    def hear() -> None:
        for event in events:
            seen.append(event["Actor"]["Attributes"])
            if seen[-1].get("flexsink.run") == last:
                return

    listener = threading.Thread(target=hear, daemon=True)
    listener.start()
    try:
        yield seen
        marker = client.create_container(images.image_name("score"), labels={"flexsink.run": last})
        client.remove_container(marker["Id"])
        listener.join(PATIENCE_S)
        assert not listener.is_alive()
    finally:
        events.close()
        own.close()
        client.close()


@pytest.mark.slow
def test_a_whole_run_in_containers_has_the_bytes_of_one_in_this_process(quiet: RunDir, tmp_path: Path) -> None:
    with created() as seen:
        contained = whole(tmp_path / "contained", "docker", *OVERRIDES)
    own = [labels for labels in seen if labels.get("flexsink.run") == contained.labels()["flexsink.run"]]
    kinds = [labels.get(containers.LABEL, "sandbox") for labels in own]
    assert (kinds.count("gpu"), kinds.count("score")) == (1, contained.config().train.iterations)
    assert (of_run(contained), volumes(contained)) == ([], [])
    assert contents(contained) == contents(quiet)
    assert len(contents(quiet)) == len(list(stages_of(quiet.config())))


@pytest.fixture(scope="module")
def flow(prefect_server: str) -> Flow:
    return Flow(prefect_server)


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE_S * max(KILLS, 4))
def test_a_run_killed_in_and_behind_its_stages_in_and_out_of_containers_ends_like_a_quiet_one(
    flow: Flow, quiet: RunDir, tmp_path: Path
) -> None:
    """One run, killed KILLS times: in the middle of each stage and right behind it, or at some of these moments."""
    seed = int(os.environ.get("FLEXSINK_KILL_SEED", time.time_ns() % 10**9))
    print(f"FLEXSINK_KILL_SEED={seed}")
    draw = random.Random(seed)
    order = list(stages_of(quiet.config()))
    moments = [(number, where) for number in range(len(order)) for where in ("in", "behind")]
    path = tmp_path / "run"
    run, resumed, words = RunDir(path), 0, ["train", "tiny_test", *OVERRIDES, "--runner", "docker"]
    words += ["--run-dir", str(path)]
    for which in sorted(draw.sample(range(len(moments)), min(KILLS, len(moments)))):
        number, where = moments[which]
        before = contents(run)
        process = flow.start(*words)
        wait_while(process, lambda run=run, many=number + (where == "behind"): len(contents(run)) < many)
        if where == "in":
            wait_while(process, lambda path=path: not below(path, ".tmp-*"))
            time.sleep(1.5 * draw.random())
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        at_work = [str(each.relative_to(path)) for each in below(path, ".tmp-*")]
        print(f"killed {where} {order[number]}: {len(contents(run))} stages done, at work {at_work}")
        assert before.items() <= contents(run).items()
        if (path / "config.json").exists():
            wait_for(lambda run=run: not started(run))
            words = ["resume", str(path), "--runner", draw.choice(["docker", "docker", "process"])]
            resumed += 1
    code, _, errors = flow.run("resume", str(path), "--runner", "docker")
    assert (code, errors) == (0, "")
    assert resumed
    assert contents(run) == contents(quiet)
    assert (of_run(run), volumes(run)) == ([], [])
    assert (below(path, ".tmp-*"), below(path, "*.journal")) == ([], [])


def wait_while(process: "subprocess.Popen[str]", true: Callable[[], bool]) -> None:
    """Waits while it is true and the process lives."""
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_an_interrupted_run_ends_its_containers_and_says_how_to_go_on(flow: Flow, tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = flow.start("train", "tiny_test", *SMALL, "--runner", "docker", "--run-dir", str(path))
    assert journal_at_work(path / "evaluations", process, name="completions", lines=1)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (130, f"terminated; go on with: flexsink resume {path}\n")
    assert (of_run(RunDir(path)), volumes(RunDir(path))) == ([], [])
