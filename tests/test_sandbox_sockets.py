"""What a sandbox's socket lets through, where a stage in a container reaches sandboxes by sockets in a volume."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import containers, images
from stages.config import SandboxConfig
from stages.sandbox import Job, Limits, Outcome, corpus, open_pool
from stages.sandbox.image import connect
from stages.sandbox.keeper import Keeper
from stages.sandbox.self_check import HARNESS, Pick, attack_pool
from tests.contained import wait_for
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("stage_images")]

LOOK = """
import json, os, pathlib, socket, stat, sys, time
folder = pathlib.Path("/sandboxes")
try:
    end = time.monotonic() + 200
    newest = folder / sys.argv[1]
    # Until it has been given to its group, the sandbox inside is not ready.
    while not (newest.exists() and os.stat(newest).st_mode & stat.S_ISGID) and time.monotonic() < end:
        time.sleep(0.02)
    while os.access(newest, os.X_OK) and not (newest / "socket").exists() and time.monotonic() < end:
        time.sleep(0.02)
    facts = []
    with socket.socket(socket.AF_UNIX) as caller:
        if os.access(newest, os.X_OK):
            for each in (newest, newest / "socket"):
                status = os.stat(each)
                facts.append([status.st_uid, status.st_gid, oct(status.st_mode)])
        caller.connect(str(newest / "socket"))
    print(json.dumps({"facts": facts}))
except OSError as error:
    print(json.dumps({"error": type(error).__name__}))
"""
GROUP = 4711
RUN = f"test-sockets-{os.getpid()}"  # short: a socket's path may have 107 characters


@pytest.fixture
def volume() -> Iterator[str]:
    client = connect()
    name = client.create_volume(RUN, labels={"flexsink.run": RUN})["Name"]
    yield name
    for each in client.containers(all=True, filters={"label": f"flexsink.run={RUN}"}):
        client.remove_container(each["Id"], force=True)
    containers.remove_volume(client, name)
    client.close()


@pytest.fixture
def keeper(volume: str) -> Iterator[Keeper]:
    keeper = Keeper(SandboxConfig(containers=1), labels={"flexsink.run": RUN}, volume=volume, group=GROUP)
    try:
        yield keeper
    finally:
        keeper.close()


def looked(volume: str, user: str, name: str) -> Any:
    """What a process of that user and group sees of the socket in that folder, and whether it can call."""
    client = connect()
    created = client.create_container(
        images.image_name("score"),
        entrypoint=["python3", "-c", LOOK, name],
        user=user,
        labels={"flexsink.run": RUN},
        host_config=client.create_host_config(binds=[f"{volume}:/sandboxes:ro"], cap_drop=["ALL"], network_mode="none"),
    )
    client.start(created["Id"])
    client.wait(created["Id"])
    answer = json.loads(client.logs(created["Id"], stderr=False))
    client.remove_container(created["Id"])
    client.close()
    return answer


def test_the_socket_is_for_the_callers_group_alone(keeper: Keeper, volume: str) -> None:
    folder = [0, GROUP, oct(stat.S_IFDIR | 0o2770)]
    assert looked(volume, f"1000:{GROUP}", "0000-000000") == {"facts": [folder, [0, GROUP, oct(stat.S_IFSOCK | 0o660)]]}
    assert looked(volume, "1000:1000", "0000-000001") == {"error": "PermissionError"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may reach into a volume from outside")
def test_a_sandbox_is_used_up_by_its_caller_and_has_a_successor_in_a_new_folder(keeper: Keeper) -> None:
    harness = (
        "def judge(cases, ask):\n    return [{'answer': ask(b'?').decode()}]\n\ndef serve(function, receive, send):\n"
    )
    harness += "    while receive():\n        send(function().encode())\n"
    limits = Limits(cpu_s=1.0)

    def job(program: str, limits: Limits = limits) -> Job:
        return Job(job_id="0", program=program, entry="f", harness="h", cases=({},), limits=limits)

    sockets = Path(keeper.root)
    for number in range(2):
        with open_pool(keeper.config, harnesses={"h": harness}, labels={}, sockets=sockets) as pool:
            good = pool.submit(job("def f():\n    return 'yes'\n")).result(timeout=PATIENCE_S)
            assert (good.outcome, good.cases) == (Outcome.ok, ({"answer": "yes"},))
            endless = pool.submit(job("def f():\n    while True: pass\n", Limits(cpu_s=5.0)))
            group = wait_for(lambda: groups_of_case(keeper))
            assert group == "-", "a case has no group, least of all the caller's"
            assert endless.result(timeout=PATIENCE_S).outcome is Outcome.timeout
            calling = job("def f():\n    import socket\n    return str(socket.socket(socket.AF_UNIX))\n")
            assert pool.submit(calling).result(timeout=PATIENCE_S).outcome is Outcome.foreign_import
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
