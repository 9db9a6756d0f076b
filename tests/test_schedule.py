"""Schedules on a machine that people share: the services of containers/compose.yaml, run from Debian's packages.

PostgreSQL, the Prefect server, the deployments and the worker run with the commands and settings that docker-compose
reads from the file; only addresses differ. Stages are small ones (tests/small_stages.py), everything else is real.
"""

import asyncio
import base64
import datetime
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from flows import server
from flows.config import resolved
from flows.presets import preset
from flows.progress import Lines
from flows.steps import local
from flows.train import loop, stages_of
from stages.artifacts import RunDir, Session, survey
from stages.config import replace
from tests import small_stages
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "containers/compose.yaml"
AUTH = "anna:secret"
POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/nowhere"))
DEPLOYMENT = "flexsink scheduled/tiny"
needs_compose = pytest.mark.skipif(shutil.which("docker-compose") is None, reason="needs docker-compose")
needs_postgres = pytest.mark.skipif(not POSTGRES.exists(), reason="needs the package postgresql")


def compose(home: Path) -> dict[str, Any]:
    """What docker-compose makes of the file."""
    environment = os.environ | {"FLEXSINK_HOME": str(home), "FLEXSINK_AUTH": AUTH}
    command = ["docker-compose", "-f", str(COMPOSE), "config"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    body: dict[str, Any] = yaml.safe_load(done.stdout)
    return body


@needs_compose
def test_the_composition_keeps_its_data_listens_here_only_and_gives_the_docker_socket_to_the_worker_alone(
    tmp_path: Path,
) -> None:
    services = compose(tmp_path)["services"]
    assert set(services) == {"postgres", "server", "deployments", "worker"}
    with_socket = {name for name, body in services.items() if "docker.sock" in str(body.get("volumes"))}
    assert with_socket == {"worker"}
    ports = {name: body["ports"] for name, body in services.items() if body.get("ports")}
    assert set(ports) == {"server"}
    assert all("127.0.0.1" in str(port) for port in ports["server"])
    assert any("/var/lib/postgresql/data" in str(volume) for volume in services["postgres"]["volumes"])
    assert {str(tmp_path)} == {services[name]["working_dir"] for name in ("deployments", "worker")}


@needs_compose
def test_whoever_starts_stages_in_containers_keeps_checkpoints_where_the_host_has_them_too(tmp_path: Path) -> None:
    worker = compose(tmp_path)["services"]["worker"]
    assert Path(worker["environment"]["HF_HOME"]).is_relative_to(tmp_path)
    assert any(str(tmp_path) in str(volume) for volume in worker["volumes"])
    deployments = yaml.safe_load((ROOT / "containers/prefect.yaml").read_text())["deployments"]
    pools = [each["work_pool"] for each in deployments if each["work_pool"]["name"] == "flexsink-docker"]
    assert pools
    for pool in pools:
        home = "{{ $FLEXSINK_HOME }}"
        assert pool["job_variables"]["env"]["HF_HOME"].startswith(f"{home}/")
        assert f"{home}:{home}" in pool["job_variables"]["volumes"]


@needs_compose
def test_a_composition_without_a_password_is_refused() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "FLEXSINK_AUTH"}
    environment |= {"FLEXSINK_HOME": "/tmp"}
    command = ["docker-compose", "-f", str(COMPOSE), "config"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "user:password" in done.stderr


def test_serving_sees_the_end_of_a_run_behind_more_runs_than_a_server_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = importlib.import_module("flows.schedule")  # it imports Prefect

    class Client:
        """A server with 300 runs that ended and one more after a while, of which it lists 200."""

        paused: Any = None
        asked = 0

        async def __aenter__(self) -> "Client":
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

        async def count_flow_runs(self, **_: Any) -> int:
            self.asked += 1
            return 300 if self.asked <= 3 else 301

        async def read_flow_runs(self, **_: Any) -> list[None]:
            return [None] * min(200, await self.count_flow_runs())

        async def pause_deployment(self, deployment: Any) -> None:
            self.paused = deployment

    client, deployment = Client(), uuid.uuid4()
    monkeypatch.setattr(schedule, "get_client", lambda: client)
    monkeypatch.setattr(schedule, "POLL_S", 0.001)
    asyncio.run(asyncio.wait_for(schedule.ended(mock.Mock(), deployment, 1), 10))
    assert client.paused == deployment
    assert client.asked > 3


def test_schedules_that_differ_are_deployments_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = importlib.import_module("flows.schedule")
    told: list[tuple[str, dict[str, Any]]] = []

    class Runner:
        def __init__(self, **_: Any) -> None:
            pass

        async def aadd_flow(self, _: Any, *, name: str, parameters: dict[str, Any], **__: Any) -> None:
            told.append((name, parameters))

        async def start(self) -> None:
            pass

    monkeypatch.setattr(schedule, "Runner", Runner)

    def name(folder: str, *overrides: str) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        asyncio.run(schedule.serving("tiny", list(overrides), "0 3 * * *", 1, 0))
        assert told[-1][1] == {"preset_name": "tiny", "overrides": [*overrides], "root": str(tmp_path / folder)}
        return told[-1][0]

    monkeypatch.setenv("PREFECT_API_URL", "http://prefect.example/api")
    kinds = [("a", ()), ("b", ()), ("a", ("train.seed=1",)), ("a", ("train.seed=2",)), ("b", ("train.seed=1",))]
    names = [name(folder, *overrides) for folder, overrides in kinds]
    assert len(set(names)) == 5
    assert all(re.fullmatch("flexsink-tiny-[0-9a-f]{8}", each) for each in names)
    assert [name(folder, *overrides) for folder, overrides in kinds] == names
    # The project's own server.
    (tmp_path / "a/data/.prefect").mkdir(parents=True)
    state = {"url": os.environ["PREFECT_API_URL"], "pid": 1}
    (tmp_path / "a/data/.prefect/server.json").write_text(json.dumps(state))
    assert name("a") == "flexsink-tiny"
    assert name("a", "train.seed=1") not in ("flexsink-tiny", *names)


def test_a_tick_opens_no_run_that_was_done_and_passes_over_one_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = importlib.import_module("flows.schedule")
    for name in ("load", "rollout", "score", "update", "evaluate", "export"):
        monkeypatch.setitem(sys.modules, f"stages.{name}", sys.modules.get(f"stages.{name}"))
    small_stages.install()
    monkeypatch.setattr(schedule, "deployment", mock.Mock())
    schedule.deployment.name = "nightly"
    config = resolved(preset("tiny_test"))
    done = schedule.fresh(config, tmp_path)
    with Session() as session, open(os.devnull, "w") as nowhere, Lines(nowhere) as view:
        loop(config, local(done, config, session, view))
    longer = replace(config, "train", iterations=3)
    assert schedule.left_unfinished(longer, tmp_path) is None
    begun = schedule.fresh(config, tmp_path)
    for body in (b'{"nonsense": 1}', b"\xff\xff\xff"):
        unreadable = schedule.fresh(config, tmp_path)
        (unreadable.path / "config.json").write_bytes(body)
        assert schedule.left_unfinished(longer, tmp_path).path == begun.path
        assert f"{unreadable.path} is passed over" in caplog.text


class Machine:
    """The services at work, and a folder that is FLEXSINK_HOME."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.services = compose(home)["services"]
        self.ports = {"postgres:5432": server.free_port(), "server:4200": server.free_port()}
        self.url = f"http://127.0.0.1:{self.ports['server:4200']}/api"
        self.started: list[subprocess.Popen[bytes]] = []
        self.worker: subprocess.Popen[bytes] | None = None
        self.mood = home / "mood"
        self.mood.write_text("")
        for name in ("containers", "flows", "stages", "tests"):
            (home / name).symlink_to(ROOT / name)
        # What Prefect starts gets the small stages through sitecustomize.
        (home / "sitecustomize.py").write_text("from tests.small_stages import install\ninstall()\n")

    def environment(self, service: str) -> dict[str, str]:
        """The service's own variables, with addresses of this machine, and little else."""
        here = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        here |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PREFECT_HOME": str(self.home / "p")}
        for name, value in self.services[service].get("environment", {}).items():
            for address, port in self.ports.items():
                value = value.replace(address, f"127.0.0.1:{port}")
            here[name] = value
        here |= {"SMALL_STAGES": f"@{self.mood}", "FLEXSINK_LOCKS": str(self.home / "locks")}
        return here | {"PREFECT_WORKER_QUERY_SECONDS": "1"}  # instead of 10

    def command(self, service: str) -> list[str]:
        port = {"0.0.0.0": "127.0.0.1", "4200": str(self.ports["server:4200"])}
        return [port.get(word, word) for word in self.services[service]["command"]]

    def start(self, service: str) -> "subprocess.Popen[bytes]":
        with open(self.home / f"{service}.log", "ab") as output:
            process = subprocess.Popen(
                self.command(service),
                cwd=self.home,
                env=self.environment(service),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def start_postgres(self, folder: Path) -> None:
        """A cluster as the image's entry point makes it."""
        wanted, port = self.services["postgres"]["environment"], str(self.ports["postgres:5432"])
        user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
        if user:
            shutil.chown(folder, user)
        words = folder / "password"
        words.write_text(wanted["POSTGRES_PASSWORD"])
        words.chmod(0o644)
        name = wanted["POSTGRES_USER"]
        make = ["initdb", "-D", folder / "data", "-U", name, "-A", "scram-sha-256", "--pwfile", words, "-N"]
        subprocess.run([POSTGRES / make[0], *make[1:]], user=user, cwd=folder, check=True, capture_output=True)
        options = ["-p", port, "-k", folder, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with open(folder / "log", "wb") as output:
            command = [POSTGRES / "postgres", "-D", folder / "data", *options]
            process = subprocess.Popen(
                command, user=user, cwd=folder, stdout=output, stderr=output, start_new_session=True
            )
        self.started.append(process)
        create = [POSTGRES / "createdb", "-h", "127.0.0.1", "-p", port, "-U", name, wanted["POSTGRES_DB"]]
        environment = os.environ | {"PGPASSWORD": wanted["POSTGRES_PASSWORD"]}
        # Until it listens, and then until it has started up, the command fails.
        wait_for(lambda: subprocess.run(create, env=environment).returncode == 0, 300, "PostgreSQL")

    def stop(self) -> None:
        for process in reversed(self.started):
            for number in (signal.SIGTERM, signal.SIGKILL):
                if process.poll() is None:
                    process.send_signal(number)
                    try:
                        process.wait(timeout=20)
                    except subprocess.TimeoutExpired:
                        continue

    def ask(self, path: str, *, list_: list[Any] | None = None, method: str = "", **body: Any) -> Any:
        """What the server's HTTP interface answers."""
        headers = {
            "Content-Type": "application/json",
            "Authorization": "Basic " + base64.b64encode(AUTH.encode()).decode(),
        }
        asked = list_ or body
        data = json.dumps(asked).encode() if asked else None
        method = method or ("POST" if asked else "GET")
        request = urllib.request.Request(f"{self.url}/{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read() or "null")

    def deployment(self) -> str:
        return str(self.ask(f"deployments/name/{DEPLOYMENT.replace(' ', '%20')}")["id"])

    def tick(self) -> str:
        """Has the deployment run now; the flow run's id."""
        body = self.ask(f"deployments/{self.deployment()}/create_flow_run", state={"type": "SCHEDULED"})
        return str(body["id"])

    def schedule(self) -> str:
        """Puts the deployment on a daily schedule whose first tick is seconds from now; that tick's flow run's id."""
        schedules = f"deployments/{self.deployment()}/schedules"
        wanted = {"deployments": {"id": {"any_": [self.deployment()]}}, "sort": "EXPECTED_START_TIME_ASC"}
        for seconds in (5, 30, 180):
            first = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
            entry = {"active": True, "schedule": {"interval": 86400, "anchor_date": first.isoformat()}}
            (made,) = self.ask(schedules, list_=[entry])
            wait_for(lambda: bool(self.ask("flow_runs/filter", **wanted)), PATIENCE_S, "the tick")
            tick = self.ask("flow_runs/filter", **wanted)[0]
            if datetime.datetime.fromisoformat(tick["expected_start_time"]) < first + datetime.timedelta(hours=1):
                return str(tick["id"])
            self.ask(f"{schedules}/{made['id']}", method="DELETE")  # a busy server took it when its tick had passed
        raise AssertionError(f"the server does not take a schedule within {seconds} s")

    def wait_for_state(self, flow_run: str, *states: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while (state := self.ask(f"flow_runs/{flow_run}")["state"])["type"] not in states:
            assert state["type"] in ("SCHEDULED", "PENDING", "RUNNING"), state
            assert time.monotonic() < deadline, state
            self.keep_worker()
            time.sleep(0.3)

    def keep_worker(self) -> None:
        """Does what the file's `restart` asks for. Prefect's worker dies of a retry that comes before the failed
        process has left, and takes the retry up when it is started again."""
        assert self.services["worker"]["restart"] == "unless-stopped"
        if self.worker is None or self.worker.poll() is not None:
            self.worker = self.start("worker")

    def run_of(self, flow_run: str) -> RunDir:
        """The run directory that a flow run worked in."""
        (found,) = [
            RunDir(path.parent.parent)
            for path in (self.home / "data/runs").glob("*/logs/flow_runs.txt")
            if flow_run in path.read_text()
        ]
        return found

    def flexsink(self, *words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "flows.cli", *words]
        environment = self.environment("worker")
        return subprocess.run(
            command, cwd=self.home, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
        )


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    machine = Machine(tmp_path_factory.mktemp("home"))
    folder = Path(tempfile.mkdtemp(prefix="flexsink-postgres-"))
    try:
        machine.start_postgres(folder)
        machine.start("server")
        wait_for(lambda: server.healthy(machine.url), PATIENCE_S, "the server")
        deployments = machine.start("deployments")
        assert deployments.wait(timeout=PATIENCE_S) == 0, (machine.home / "deployments.log").read_text()
        parameters = {"preset_name": "tiny_test", "overrides": []}
        machine.ask(f"deployments/{machine.deployment()}", method="PATCH", parameters=parameters)
        yield machine
    finally:
        machine.stop()
        shutil.rmtree(folder)


@needs_compose
@needs_postgres
@pytest.mark.docker
@pytest.mark.slow
def test_one_run_goes_on_by_its_schedule_a_retry_a_resume_and_the_next_tick(machine: Machine) -> None:
    deployments = {each["name"]: each for each in machine.ask("deployments/filter", limit=50)}
    assert set(deployments) == {"tiny", "gpt-oss-20b", "gpt-oss-20b-docker"}
    assert not any(schedule["active"] for each in deployments.values() for schedule in each["schedules"])

    # A scheduled tick fails in the second iteration.
    machine.mood.write_text("fail")
    machine.keep_worker()
    flow_run = machine.schedule()
    machine.wait_for_state(flow_run, "FAILED")
    assert machine.ask(f"flow_runs/{flow_run}")["auto_scheduled"]
    assert "the tokens ran out" in machine.ask(f"flow_runs/{flow_run}")["state"]["message"]
    run = machine.run_of(flow_run)
    assert machine.ask(f"flow_runs/{flow_run}")["name"] == run.path.name
    done = {path: path.stat().st_ino for path in run.path.rglob("manifest.json")}
    assert len(done) == 5

    # It is retried as the button in the UI asks for it. This try and the worker are killed together: nobody is left to
    # say so, and the flow run stays Running.
    machine.mood.write_text("pause")
    state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
    assert machine.ask(f"flow_runs/{flow_run}/set_state", state=state)["status"] == "ACCEPT"
    machine.wait_for_state(flow_run, "RUNNING")
    wait_for(lambda: bool(paused(run)), PATIENCE_S, "the pause")
    assert machine.worker is not None
    os.killpg(machine.worker.pid, signal.SIGKILL)
    for process in paused(run):
        os.kill(process, signal.SIGKILL)
    machine.worker.wait()
    assert machine.ask(f"flow_runs/{flow_run}")["state_type"] == "RUNNING"

    # A resume puts that right, and fails in its turn.
    machine.mood.write_text("fail")
    resumed = machine.flexsink("resume", str(run.path))
    assert (resumed.returncode, resumed.stderr.splitlines()) == (
        2,
        ["error: the tokens ran out", "hint: buy more tokens"],
    )
    assert "reused        5 stages, the last is update 0" in resumed.stdout
    assert machine.ask(f"flow_runs/{flow_run}")["state_type"] == "CRASHED"
    tasks = machine.ask("task_runs/filter", flow_runs={"id": {"any_": [flow_run]}})
    assert "RUNNING" not in {task["state_type"] for task in tasks}

    # The next tick ends it.
    machine.mood.write_text("")
    following = machine.tick()
    machine.wait_for_state(following, "COMPLETED")
    assert machine.run_of(following).path == run.path
    assert {path: path.stat().st_ino for path in done} == done
    config = run.config()
    assert {decision.action for _, decision in survey(run, config, list(stages_of(config)))} == {"REUSE"}


def paused(run: RunDir) -> list[int]:
    """The process that holds the run locked, once it has finished two completions of the second iteration."""
    journals = list(run.path.glob("iterations/00001/.tmp-*/completions.journal"))
    if not journals or journals[0].read_bytes().count(b"\n") < 2:
        return []
    inode = str((run.path / ".lock").stat().st_ino)
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" not in line]
    return [int(fields[4]) for fields in locks if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode]
