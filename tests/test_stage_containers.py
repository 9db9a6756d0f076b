"""A stage in a container with real Docker: the bytes are the process's; ends, memory, logs and GPUs are told apart.

Most tests judge a synthetic run's rollout, since score needs no model.
"""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from flows import containers, images, steps
from flows.containers import Crew, StageContainer, StageFailed, device_requests
from flows.progress import Lines
from stages.artifacts import RunDir, Session, StageId
from stages.artifacts.stage import silent
from stages.config import RunConfig, UserError, replace
from stages.model import checkpoint
from stages.sandbox.attached import Attached
from stages.sandbox.image import connect
from tests.contained import SCORE, config_of, in_process, make, of_run, rolled_out, volumes, wait_for
from tests.test_resume import below, repeated

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("stage_images")]

ROOT = Path(__file__).parent.parent


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
    config = config_of(prompts=16, group_size=16)
    run = rolled_out(tmp_path / "run", config)
    inside = in_process(run, tmp_path / "other", config)
    killed: list[str] = []
    done = threading.Event()

    def kill() -> None:
        draw, client = random.Random(10), connect()
        journal = wait_for(lambda: next(iter(below(run.path, "verdicts.journal")), None))
        wait_for(lambda: journal.read_bytes())
        while len(killed) < 10 and not done.is_set():
            running = {each["Id"] for each in of_run(run, "sandbox") if each["State"] == "running"}
            if victims := sorted(running.difference(killed)):
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


def running(text: str) -> Callable[..., StageContainer]:
    """Starts a stage's container that runs this Python text instead."""

    def start(client: Any, image: str, **settings: Any) -> StageContainer:
        settings["options"] |= {"entrypoint": ["python3", "-c", text], "command": []}
        return StageContainer(client, image, **settings)

    return start


def test_a_stage_of_any_user_can_write_temporary_files_and_to_its_home(
    run: RunDir, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "import os, tempfile\nassert os.getuid() == 4711\n"
        "for folder in ('/tmp', os.environ['HOME']):\n    tempfile.TemporaryFile(dir=folder).close()\n"
        "print('{\"done\": true}')\n"
    )

    monkeypatch.setattr(os, "getuid", lambda: 4711)
    monkeypatch.setattr(os, "getgid", lambda: 4711)
    monkeypatch.setattr(containers, "StageContainer", running(text))
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


@pytest.mark.parametrize("by_link", [False, True])
def test_a_folder_of_links_as_the_hubs_cache_has_is_whole_in_the_container(
    run: RunDir, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_link: bool
) -> None:
    blobs, snapshot = tmp_path / "model/blobs", tmp_path / "model/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere.jinja"
    for name, link in (("config.json", "../../blobs/1f2e"), ("same.json", "../../blobs/1f2e")):
        (snapshot / name).symlink_to(link)
    (snapshot / "chat_template.jinja").symlink_to(elsewhere)
    (snapshot / "again.json").symlink_to("config.json")
    (snapshot / "lost.json").symlink_to("../../blobs/gone")
    (blobs / "1f2e").write_text("{}")
    (blobs / "others").write_text("not the checkpoint's")
    elsewhere.write_text("{{ }}")
    source = snapshot
    if by_link:
        source = tmp_path / "somewhere/else/by/link"
        source.parent.mkdir(parents=True)
        source.symlink_to(snapshot)
    text = (
        f"import json, pathlib\nfolder = pathlib.Path({str(source)!r})\n"
        "found = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}\n"
        "found['blobs'] = [path.name for path in (folder / '../../blobs').iterdir()]\n"
        "print(json.dumps({'error': [json.dumps(found), '']}))\n"
    )

    monkeypatch.setattr(containers, "StageContainer", running(text))
    config = replace(config, "model", source=str(source))
    with Crew(run, config) as crew:
        crew.keep_sandboxes(False)
        container = crew.start("score", {})
        try:
            with pytest.raises(UserError) as told:
                container.ask(config, SCORE, silent)
        finally:
            container.discard()
    assert json.loads(told.value.message) == {
        "again.json": "{}",
        "blobs": ["1f2e"],
        "chat_template.jinja": "{{ }}",
        "config.json": "{}",
        "same.json": "{}",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_published_model_is_fetched_by_a_process_without_a_gpu_where_the_container_gets_one(
    run: RunDir, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(checkpoint, "cached", lambda source: asked.append(source) or snapshot)
    config = replace(config, "model", source="openai/gpt-oss-20b")
    with pytest.raises(UserError, match="needs a GPU of 16 GB"):
        containers.surroundings(run, replace(config, "steps", gpus="none"))
    assert not asked
    _, mounts, _ = containers.surroundings(run, replace(config, "steps", gpus="all"))
    assert asked == ["openai/gpt-oss-20b"]
    assert f"{tmp_path}:{tmp_path}:ro" in mounts


# How the end of a container is told.


def test_a_killed_stage_container_is_a_line_and_the_next_try_goes_on(tmp_path: Path) -> None:
    config = config_of(prompts=16, group_size=16)
    run = rolled_out(tmp_path / "run", config)
    inside = in_process(run, tmp_path / "other", config)

    def kill() -> None:
        client = connect()
        journal = wait_for(lambda: next(iter(below(run.path, "verdicts.journal")), None))
        wait_for(lambda: journal.read_bytes().count(b"\n") >= 5)
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
        "sys.stdin.readline()\nsys.stdin.readline()\nprint('{\"done\": true}')\ntime.sleep(60)\n"
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
        return "warned\n" in errors and "half a line\n" in errors  # which come by pipes of their own

    wait_for(seen)
    assert asked.is_alive(), "it is told before the stage ends"
    assert "half a line\n" in errors
    assert "score 0: warned\n" in errors
    assert "told" not in errors
    assert [record.getMessage() for record in caplog.records if record.name == "stages.score"] == ["told", "warned"]
    assert [tuple(each) for each in progress] == [("score 0", 1, 2, "completions", {"mean reward": 0.5})]
    container.attached.socket.sendall(b"end\n")
    asked.join(300)
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
