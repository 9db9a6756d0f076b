"""Stages in containers with real Docker: the bytes are the process's, and kills, memory, logs and GPUs are told apart.

Most tests judge a synthetic run's rollout, since score needs no model. FLEXSINK_KILLS says how often the run on the
bundled model is killed (3); FLEXSINK_KILL_SEED repeats a failing choice of moments.
"""

import contextlib
import io
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import pytest

from flows import containers, images, steps
from flows.config import overridden, resolved
from flows.containers import Crew, StageContainer, StageFailed, device_requests
from flows.presets import preset
from flows.progress import Lines
from flows.train import loop, stages_of
from stages.artifacts import Manifest, RunDir, Session, StageId
from stages.artifacts.stage import silent
from stages.config import RunConfig, SandboxConfig, UserError, replace
from stages.sandbox import Job, Limits, Outcome, corpus, open_pool
from stages.sandbox.attached import Attached
from stages.sandbox.image import connect
from stages.sandbox.keeper import Keeper
from stages.sandbox.self_check import HARNESS, Pick, attack_pool
from tests import synthetic_run
from tests.test_resume import Flow, below, journal_at_work, repeated

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("FLEXSINK_KILLS", "3"))
SCORE = StageId("score", 0)


@pytest.fixture(scope="session", autouse=True)
def built_images() -> None:
    """Both images; building them takes a minute where they are missing."""
    client = connect()
    for kind in images.KINDS:
        images.require(client, kind, print)
    client.close()


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


def wait_for(true: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return value


@pytest.fixture
def config() -> RunConfig:
    return config_of()


@pytest.fixture
def run(tmp_path: Path, config: RunConfig) -> RunDir:
    return rolled_out(tmp_path / "run", config)


def test_a_score_in_a_container_has_the_bytes_of_one_in_this_process(config: RunConfig, tmp_path: Path) -> None:
    run = rolled_out(tmp_path / "run", config, endless=True)
    contained = make(run, config)
    inside = in_process(run, tmp_path / "other", config)
    assert (contained.key, contained.digest) == (inside.key, inside.digest)
    assert contained.recorded["runner"] == "docker"
    assert contained.recorded["image"] == images.image_name("score")
    assert contained.recorded["code"] == inside.recorded["code"]
    assert "torch" not in contained.recorded["versions"]
    assert (of_run(run), volumes(run)) == ([], [])


def test_a_finished_stage_starts_no_container(run: RunDir, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(run, config)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    assert make(run, config) == made


def test_ten_sandboxes_killed_in_mid_run_change_no_verdict(tmp_path: Path) -> None:
    config = config_of(prompts=8, group_size=16)
    run = rolled_out(tmp_path / "run", config)
    inside = in_process(run, tmp_path / "other", config)
    killed: list[str] = []
    done = threading.Event()

    def kill() -> None:
        draw, client = random.Random(10), connect()
        journal = wait_for(lambda: next(iter(below(run.path, "verdicts.journal")), None))
        wait_for(lambda: journal.read_bytes())
        while len(killed) < 10 and not done.is_set():
            victims = [each["Id"] for each in of_run(run, "sandbox") if each["State"] == "running"]
            if victims:
                victim = draw.choice(victims)
                with contextlib.suppress(Exception):  # it may just be ending
                    client.kill(victim)
                    killed.append(victim)
            time.sleep(0.1)
        client.close()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        manifest = make(run, config)
    finally:
        done.set()
        killer.join()
    assert len(set(killed)) == 10, "the stage was over before ten could be killed"
    assert manifest.digest == inside.digest
    assert (of_run(run), volumes(run)) == ([], [])


def test_a_stage_container_has_no_docker_no_network_no_rights_and_the_callers_uid(
    run: RunDir, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def start(attached: Attached) -> None:
        seen.append(attached.client.inspect_container(attached.id))
        original(attached)

    original = Attached.start
    monkeypatch.setattr(Attached, "start", start)
    make(run, config)
    assert not seen[-1]["State"]["Running"]
    stage = next(each for each in seen if each["Config"]["Labels"].get(containers.LABEL) == "score")
    host = stage["HostConfig"]
    assert stage["Config"]["User"] == f"{os.getuid()}:{os.getgid()}"
    assert stage["Config"]["Labels"]["flexsink.stage"] == "score 0"
    assert stage["Config"]["Labels"]["flexsink.run"] == run.labels()["flexsink.run"]
    assert len(stage["Config"]["Labels"]["flexsink.key"]) == 64
    targets = {mount["Destination"]: mount["RW"] for mount in stage["Mounts"] if mount["Type"] != "tmpfs"}
    assert targets == {str(run.path): True, str(ROOT / "data/tiny"): False, "/sandboxes": False}
    assert "docker.sock" not in json.dumps(host)
    assert (host["NetworkMode"], host["ReadonlyRootfs"], host["Privileged"]) == ("none", True, False)
    assert (host["CapDrop"], host["CapAdd"], host["SecurityOpt"]) == (["ALL"], None, ["no-new-privileges:true"])
    assert (host["AutoRemove"], host["Init"]) == (True, True)
    assert not host["DeviceRequests"]
    for sandbox in (each for each in seen if "flexsink.sandbox" in each["Config"]["Labels"]):
        (mount,) = sandbox["Mounts"]
        assert (Path(mount["Source"]).parent.name, mount["Destination"]) == ("_data", "/socket")
        assert sandbox["HostConfig"]["NetworkMode"] == "none"
        assert sorted(sandbox["HostConfig"]["CapAdd"]) == ["KILL", "SETGID", "SETUID"]


def test_a_stage_of_any_user_can_write_temporary_files_and_to_its_home(
    run: RunDir, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "import os, tempfile\nassert os.getuid() == 4711\n"
        "for folder in ('/tmp', os.environ['HOME']):\n    tempfile.TemporaryFile(dir=folder).close()\n"
        "print('{\"done\": true}')\n"
    )

    def start(client: Any, image: str, **settings: Any) -> StageContainer:
        settings["options"] |= {"entrypoint": ["python3", "-c", text], "command": []}
        return StageContainer(client, image, **settings)

    monkeypatch.setattr(os, "getuid", lambda: 4711)
    monkeypatch.setattr(os, "getgid", lambda: 4711)
    monkeypatch.setattr(containers, "StageContainer", start)
    for home in ("/home/somebody", "/tmp/somebody", "/var"):
        monkeypatch.setenv("HOME", home)
        with Crew(run, config) as crew:
            crew.keep_sandboxes(False)
            container = crew.start("score", {})
            try:
                container.ask(config, SCORE, silent)
            finally:
                container.discard()


def test_a_checkpoint_of_the_hub_comes_with_the_cache_that_it_is_in(
    run: RunDir, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    snapshot = cache / "models--somebody--small/snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in (ROOT / "data/tiny").iterdir():
        (snapshot / file.name).symlink_to(file)
    (cache / "models--somebody--small/refs").mkdir()
    (cache / "models--somebody--small/refs/main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    config = replace(config, "model", source="somebody/small")
    _, mounts, variables = containers.surroundings(run, config)
    assert mounts == [f"{run.path}:{run.path}:rw", f"{cache}:{cache}:ro"]
    assert (variables["HF_HUB_CACHE"], variables["HF_HUB_OFFLINE"]) == (str(cache), "1")


# What a sandbox's socket lets through.

LOOK = """
import json, os, pathlib, socket, stat, sys, time
folder = pathlib.Path("/sandboxes")
try:
    end = time.monotonic() + 20
    while not (found := sorted(folder.glob("*/socket"))) and time.monotonic() < end and os.access(folder, os.X_OK):
        if any(not os.access(each, os.X_OK) for each in folder.iterdir()):
            break
        time.sleep(0.02)
    facts = []
    for path in found:
        for each in (path.parent, path):
            status = os.stat(each)
            facts.append([status.st_uid, status.st_gid, oct(status.st_mode)])
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(found[0]) if found else str(next(folder.iterdir()) / "socket"))
    print(json.dumps({"facts": facts}))
except OSError as error:
    print(json.dumps({"error": type(error).__name__}))
"""
GROUP = 4711


@pytest.fixture
def volume() -> Iterator[str]:
    client = connect()
    # A name of its own: a socket's path may have 107 characters.
    name = client.create_volume(f"test-sockets-{os.getpid()}", labels={"flexsink.run": "test-sockets"})["Name"]
    yield name
    for each in client.containers(all=True, filters={"label": "flexsink.run=test-sockets"}):
        client.remove_container(each["Id"], force=True)
    containers.remove_volume(client, name)
    client.close()


@pytest.fixture
def keeper(volume: str) -> Iterator[Keeper]:
    keeper = Keeper(SandboxConfig(containers=1), labels={"flexsink.run": "test-sockets"}, volume=volume, group=GROUP)
    try:
        yield keeper
    finally:
        keeper.close()


def looked(volume: str, user: str) -> Any:
    """What a process of that user and group sees of the sandboxes' sockets."""
    client = connect()
    created = client.create_container(
        images.image_name("score"),
        entrypoint=["python3", "-c", LOOK],
        user=user,
        labels={"flexsink.run": "test-sockets"},
        host_config=client.create_host_config(binds=[f"{volume}:/sandboxes:ro"], cap_drop=["ALL"], network_mode="none"),
    )
    client.start(created["Id"])
    client.wait(created["Id"])
    answer = json.loads(client.logs(created["Id"], stderr=False))
    client.remove_container(created["Id"])
    client.close()
    return answer


def test_the_socket_is_for_the_callers_group_alone(keeper: Keeper, volume: str) -> None:
    wait_for(lambda: keeper.num_started)
    folder = [0, GROUP, oct(stat.S_IFDIR | 0o2770)]
    assert looked(volume, f"1000:{GROUP}") == {"facts": [folder, [0, GROUP, oct(stat.S_IFSOCK | 0o660)]]}
    wait_for(lambda: keeper.num_started == 2)
    time.sleep(1.0)  # its successor is listening
    assert looked(volume, "1000:1000") == {"error": "PermissionError"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may reach into a volume from outside")
def test_a_sandbox_is_used_up_by_its_caller_and_has_a_successor_in_a_new_folder(keeper: Keeper) -> None:
    harness = (
        "def judge(cases, ask):\n    return [{'answer': ask(b'?').decode()}]\n\ndef serve(function, receive, send):\n"
    )
    harness += "    while receive():\n        send(function().encode())\n"
    limits = Limits(cpu_s=1.0)

    def job(program: str) -> Job:
        return Job(job_id="0", program=program, entry="f", harness="h", cases=({},), limits=limits)

    sockets = Path(keeper.root)
    for number in range(2):
        with open_pool(keeper.config, harnesses={"h": harness}, labels={}, sockets=sockets) as pool:
            good = pool.submit(job("def f():\n    return 'yes'\n")).result(timeout=60)
            assert (good.outcome, good.cases) == (Outcome.ok, ({"answer": "yes"},))
            endless = pool.submit(job("def f():\n    while True: pass\n"))
            group = wait_for(lambda: groups_of_case(keeper))
            assert group == "-", "a case has no group, least of all the caller's"
            assert endless.result(timeout=60).outcome is Outcome.timeout
            calling = job("def f():\n    import socket\n    return str(socket.socket(socket.AF_UNIX))\n")
            assert pool.submit(calling).result(timeout=60).outcome is Outcome.foreign_import
        wait_for(lambda started=2 * number + 3: keeper.num_started >= started)  # one for the timeout, one at the end
    names = sorted(folder.name for folder in sockets.iterdir())
    assert names[:4] == [f"0000-{number:06d}" for number in range(4)]


def groups_of_case(keeper: Keeper) -> str:
    """The supplementary groups of the case at work, as ps shows them; "" while there is none."""
    client = connect()
    try:
        with keeper.lock:
            live = [each.id for each in keeper.live]
        for name in live:
            with contextlib.suppress(Exception):  # it may be ending
                for _pid, uid, *groups in client.top(name, ps_args="-o pid,uid,supgid")["Processes"]:
                    if uid == "10001":
                        return " ".join(groups) or "-"
    finally:
        client.close()
    return ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may reach into a volume from outside")
def test_the_attacks_that_go_for_sockets_come_to_nothing_where_the_supervisor_has_one(keeper: Keeper) -> None:
    chosen = [
        each for each in corpus.load() if each.task == "pick" and ("socket" in each.name or "descriptor" in each.name)
    ]
    assert len(chosen) >= 3
    with open_pool(keeper.config, harnesses={"pick": HARNESS}, labels={}, sockets=Path(keeper.root)) as pool:
        findings = list(attack_pool(pool, chosen, arenas={"pick": Pick()}))
    assert [finding.failure for finding in findings if not finding.passed] == []


# How the end of a container is told.


def test_a_killed_stage_container_is_a_line_and_the_next_try_goes_on(tmp_path: Path) -> None:
    config = config_of(prompts=4, group_size=16)
    run = rolled_out(tmp_path / "run", config)
    inside = in_process(run, tmp_path / "other", config)

    def kill() -> None:
        journal = wait_for(lambda: next(iter(below(run.path, "verdicts.journal")), None))
        wait_for(lambda: journal.read_bytes().count(b"\n") >= 5)
        client = connect()
        client.kill(of_run(run, "score")[0]["Id"])
        client.close()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(UserError, match=r"^the container of score 0 was killed from outside$") as raised:
        make(run, config)
    killer.join()
    assert "flexsink resume" in raised.value.hint
    assert (of_run(run), volumes(run)) == ([], [])
    (journal,) = below(run.path, "verdicts.journal")
    before = journal.read_bytes()
    os.link(journal, tmp_path / "kept.journal")
    assert make(run, config).digest == inside.digest
    assert (tmp_path / "kept.journal").read_bytes().startswith(before)
    assert repeated(tmp_path / "kept.journal") == []


def test_a_container_without_enough_memory_is_told_apart_from_a_kill(tmp_path: Path) -> None:
    config = config_of(memory_bytes=24 << 20)
    run = rolled_out(tmp_path / "run", config)
    with pytest.raises(UserError, match=r"^score 0 ran out of memory in its container of 24 MiB$") as raised:
        make(run, config)
    assert "steps.memory_bytes" in raised.value.hint
    assert (of_run(run), volumes(run)) == ([], [])


def test_a_bug_in_a_stage_comes_out_with_its_traceback(run: RunDir, config: RunConfig) -> None:
    with Crew(run, config) as crew:
        crew.keep_sandboxes(False)
        container = crew.start("score", {})
        try:
            with pytest.raises(StageFailed, match=r"Traceback(?s:.*)No module named 'stages.nonsense'"):
                container.ask(config, StageId("nonsense"), silent)
            with pytest.raises(StageFailed, match="No module named 'torch'"):  # the worker is there; torch is not
                container.ask(config, StageId("update", 0), silent)
        finally:
            container.discard()


def script(run: RunDir, text: str) -> StageContainer:
    """A container that does not run the worker but this program."""
    client = connect()
    options = {
        "entrypoint": ["python3", "-u", "-c", text],
        "host_config": client.create_host_config(auto_remove=True, network_mode="none", init=True),
    }
    labels = {**run.labels(), containers.LABEL: "score"}
    return StageContainer(client, images.image_name("score"), labels=labels, memory_bytes=0, options=options)


def test_what_a_stage_logs_and_prints_comes_out_while_it_runs(
    run: RunDir, config: RunConfig, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    text = (
        'import sys, time\nprint("half a", end="", file=sys.stderr)\ntime.sleep(0.2)\nprint(" line", file=sys.stderr)\n'
        'print(\'{"progress": ["score 0", 1, 2, "completions", {"mean reward": 0.5}]}\')\n'
        'print(\'{"log": ["stages.score", 20, "told"]}\')\nprint(\'{"log": ["stages.score", 30, "warned"]}\')\n'
        "sys.stdin.readline()\ntime.sleep(2)\nprint('{\"done\": true}')\ntime.sleep(60)\n"
    )
    progress = []
    container = script(run, text)
    caplog.set_level("INFO")
    asked = threading.Thread(target=container.ask, args=(config, SCORE, progress.append))
    asked.start()
    errors = ""

    def seen() -> bool:
        nonlocal errors
        errors += capfd.readouterr().err
        return "warned" in errors

    wait_for(seen, 20)
    assert asked.is_alive(), "it is told before the stage ends"
    assert "half a line\n" in errors
    assert "score 0: warned\n" in errors
    assert "told" not in errors
    assert [record.getMessage() for record in caplog.records if record.name == "stages.score"] == ["told", "warned"]
    assert [tuple(each) for each in progress] == [("score 0", 1, 2, "completions", {"mean reward": 0.5})]
    asked.join(30)
    assert not asked.is_alive()
    container.discard()
    assert of_run(run) == []


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("sys.exit(3)", "the container of score 0 ended with status 3: last words"),
        ("os.kill(os.getpid(), 15)", "the container of score 0 was stopped from outside"),
        ("raise KeyError('x')", "the container of score 0 ended with status 1: KeyError: 'x'"),
    ],
)
def test_an_exit_status_is_put_into_words(run: RunDir, config: RunConfig, ending: str, message: str) -> None:
    container = script(run, f"import os, sys\nprint('last words', file=sys.stderr)\n{ending}\n")
    with pytest.raises(UserError) as raised:
        container.ask(config, SCORE, silent)
    assert raised.value.message == message
    container.discard()
    assert of_run(run) == []


# GPUs.


def test_the_gpu_container_asks_docker_for_cards_and_says_in_a_line_when_it_has_none_to_give(
    run: RunDir, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def start(attached: Attached) -> None:
        created = attached.client.inspect_container(attached.id)
        if created["Config"]["Labels"].get(containers.LABEL) == "gpu":
            asked.append(created["HostConfig"]["DeviceRequests"])
        original(attached)

    original = Attached.start
    monkeypatch.setattr(Attached, "start", start)
    wanted = {"Driver": "", "Capabilities": [["gpu"]], "Options": {}}
    for gpus, more in (
        ("all", {"Count": -1, "DeviceIDs": []}),
        ("0,GPU-3f", {"Count": 0, "DeviceIDs": ["0", "GPU-3f"]}),
    ):
        given = replace(config, "steps", gpus=gpus)
        if "nvidia" in connect().info()["Runtimes"]:
            pytest.skip("this machine has a GPU runtime")
        with Crew(run, given) as crew, pytest.raises(UserError) as raised:
            crew.make(given, StageId("load"), "key", silent)
        assert asked.pop() == [{**wanted, **more}]
        assert raised.value.message.startswith("Docker cannot give a container a GPU: could not select device driver")
        assert "\n" not in raised.value.message
        assert "nvidia-container-toolkit" in raised.value.hint
        assert "steps.gpus=none" in raised.value.hint
    assert (of_run(run), volumes(run)) == ([], [])


def test_auto_asks_for_one_card_where_there_are_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    exists = Path.exists
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for there, visible, expected in (
        (False, None, []),
        (True, None, [(1, None)]),
        (True, "2,3", [(0, ["2"])]),
        (True, "", []),
        (True, "-1", []),
    ):
        monkeypatch.setattr(Path, "exists", lambda path, there=there: there if "nvidia" in str(path) else exists(path))
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [(each["Count"], each["DeviceIDs"]) for each in device_requests("auto")] == expected
    assert device_requests("none") == []


# What is left after a kill, and the whole run.

LIVING = """
import sys
from pathlib import Path
from stages.artifacts import RunDir
from stages.exits import guarded
from tests.test_stage_containers import make
run = RunDir(Path(sys.argv[1]))
sys.exit(guarded(lambda: bool(make(run, run.config()))))
"""


def living(run: RunDir) -> "subprocess.Popen[bytes]":
    """A process in the middle of the run's score."""
    process = subprocess.Popen([sys.executable, "-c", LIVING, str(run.path)], cwd=ROOT, start_new_session=True)
    wait_for(lambda: below(run.path, "verdicts.journal"), 60)
    assert {each["State"] for each in of_run(run)} >= {"running"}
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_container_and_no_volume(tmp_path: Path, number: signal.Signals) -> None:
    run = rolled_out(tmp_path / "run", config_of(prompts=4, group_size=16))
    process = living(run)
    os.kill(process.pid, number)
    assert process.wait(30) == 130
    assert (of_run(run), volumes(run)) == ([], [])


def test_containers_end_with_a_killed_process_and_the_next_start_removes_what_is_left(tmp_path: Path) -> None:
    config = config_of(prompts=8, group_size=16)
    run = rolled_out(tmp_path / "run", config)
    process = living(run)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not of_run(run), 20)
    assert len(volumes(run)) == 1
    client = connect()
    left = client.create_container(images.image_name("score"), labels={**run.labels(), containers.LABEL: "gpu"})
    steps.reap(run)
    assert (of_run(run), volumes(run)) == ([], [])
    with pytest.raises(Exception, match="No such container"):
        client.inspect_container(left["Id"])
    client.close()


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


@pytest.mark.slow
def test_a_whole_run_in_containers_has_the_bytes_of_one_in_this_process(quiet: RunDir, tmp_path: Path) -> None:
    started = time.time()
    contained = whole(tmp_path / "contained", "docker", *OVERRIDES)
    client = connect()
    wanted = {"label": f"flexsink.run={contained.labels()['flexsink.run']}", "event": "create", "type": "container"}
    events = client.events(since=int(started), until=int(time.time()) + 1, filters=wanted, decode=True)
    kinds = [event["Actor"]["Attributes"].get(containers.LABEL, "sandbox") for event in events]
    client.close()
    assert (kinds.count("gpu"), kinds.count("score")) == (1, contained.config().train.iterations)
    assert (of_run(contained), volumes(contained)) == ([], [])
    assert contents(contained) == contents(quiet)
    assert len(contents(quiet)) == len(list(stages_of(quiet.config())))


@pytest.fixture(scope="module")
def flow(prefect_server: str) -> Flow:
    return Flow(prefect_server)


@pytest.mark.slow
@pytest.mark.timeout(200 * max(KILLS, 4))
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
            wait_for(lambda: not of_run(run), 20)
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
    deadline = time.monotonic() + 300
    while process.poll() is None and true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_an_interrupted_run_ends_its_containers_and_says_how_to_go_on(flow: Flow, tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = flow.start("train", "tiny_test", *SMALL, "--runner", "docker", "--run-dir", str(path))
    assert journal_at_work(path / "evaluations", process, name="completions", lines=1)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, f"terminated; go on with: flexsink resume {path}\n")
    assert (of_run(RunDir(path)), volumes(RunDir(path))) == ([], [])


@pytest.mark.timed
def test_a_container_costs_a_score_less_than_2_s_above_its_own_imports(
    run: RunDir, config: RunConfig, tmp_path: Path
) -> None:
    def seconds(action: Callable[[], Any]) -> float:
        began = time.perf_counter()
        action()
        return time.perf_counter() - began

    def scores(config: RunConfig, name: str) -> list[float]:
        """The seconds of four scores of a session, which keeps its sandboxes warm."""
        times = []
        with Session() as session:
            for number in range(4):
                times.append(seconds(lambda: steps.run_stage(run, config, SCORE, session, Lines(io.StringIO()))))
                os.rename(run.folder(SCORE), tmp_path / f"{name}-{number}")
        return times

    first, *contained = scores(config, "contained")
    inside = scores(replace(config, "steps", runner="process"), "inside")[1:]
    importing = [sys.executable, "-c", "import stages.score"]
    imports = min(seconds(lambda: subprocess.run(importing, cwd=ROOT, check=True)) for _ in range(3))
    usual, here = sorted(contained)[1], sorted(inside)[1]
    print(f"\nscore of 16 completions: {here:.2f} s here, {usual:.2f} s in a container, at first {first:.2f} s")
    print(f"python and its imports: {imports:.2f} s")
    assert usual - here - imports < 2.0
