"""The Prefect server: PREFECT_API_URL where it is set, else one of the project's own, started once and then reused.

The project's server lives under data/.prefect: its database, its log, and server.json with its address and process id.
It listens on the loopback address only, belongs to no terminal and outlives the command that started it.
"""

import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stages.artifacts import RunDir
from stages.artifacts.run import explained, locked, write_json
from stages.config import UserError

HOME = Path("data/.prefect")
START_TIMEOUT_S = 300.0  # a new database takes 8-13 s on an idle machine of two cores
ELSEWHERE = "start a server elsewhere by `prefect server start`, and set PREFECT_API_URL to the address that it tells"
ANSWER_S, ANSWER_HERE_S = 5.0, 30.0  # on this machine nothing is lost on the way: who does not answer yet is busy
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",  # else a fresh database prints a "database is locked" traceback
    "DO_NOT_TRACK": "1",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,stages",
}


def connect(note: Callable[[str], None]) -> str:
    """The API's address, answering, and this process's settings made to use it. Call it before Prefect is imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    url = os.environ.get("PREFECT_API_URL")
    if url:
        if not healthy(url):
            raise UserError(
                f"no Prefect server answers at PREFECT_API_URL={url}",
                "start it, or unset PREFECT_API_URL for a local one",
            )
        return url
    go_past_proxies()
    url = local_server(HOME.resolve(), note)
    os.environ["PREFECT_API_URL"] = url
    os.environ.setdefault("PREFECT_HOME", str(HOME.resolve()))
    return url


def go_past_proxies() -> None:
    """Has this process and its children reach 127.0.0.1 directly, whatever http_proxy says."""
    names = ("no_proxy", "NO_PROXY")  # where both are set, some programs read the one and some the other
    hosts = [host for name in names for host in os.environ.get(name, "").split(",") if host]
    if "*" not in hosts:
        os.environ.update(dict.fromkeys(names, ",".join(dict.fromkeys([*hosts, "127.0.0.1"]))))


def is_own(url: str) -> bool:
    """Whether that is the address of the project's own server."""
    state = read_state(HOME.resolve())
    return state is not None and state["url"] == url


def local_server(home: Path, note: Callable[[str], None]) -> str:
    """The address of the server under `home`, started if none answers."""
    with locked(home / ".lock", "", wait=True, hint=ELSEWHERE):
        state = read_state(home)
        if state and healthy(state["url"]):
            return str(state["url"])
        if state:
            stop(home)
        note("starting the project's Prefect server")
        return start(home)


def start(home: Path) -> str:
    """Starts a server of its own session under `home` and returns its address once it answers."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= QUIET | {"PREFECT_HOME": str(home), "PREFECT_SERVER_LOGGING_LEVEL": "WARNING"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with open(home / "server.log", "ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    write_json(home / "server.json", {"url": url, "pid": process.pid, "started": started_at(process.pid)})
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if healthy(url):
            return url
        if process.poll() is not None:
            break
        time.sleep(0.2)
    stop(home)
    raise UserError("the project's Prefect server did not start", f"see {home / 'server.log'}, or set PREFECT_API_URL")


def stop(home: Path) -> None:
    """Ends the server that server.json names, if that process is still the one that was started, and forgets it."""
    state = read_state(home)
    (home / "server.json").unlink(missing_ok=True)
    if not state or started_at(state["pid"]) != state.get("started") or state.get("started") is None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(state["pid"], number)
        for _ in range(50):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(state["pid"], os.WNOHANG)
            if started_at(state["pid"]) is None:
                return
            time.sleep(0.1)


def read_state(home: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((home / "server.json").read_text())
        return {"url": str(state["url"]), "pid": int(state["pid"]), "started": state.get("started")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def started_at(pid: int) -> int | None:
    """When the process started, in clock ticks since boot: tells it from a later one with the same id."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def healthy(url: str) -> bool:
    """Whether a Prefect server answers there."""
    try:
        here = urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")
        timeout = ANSWER_HERE_S if here else ANSWER_S
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=timeout) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError, urllib.error.URLError, http.client.HTTPException):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quiet() -> None:
    """Takes Prefect's console handlers away; its records go to the server and to the run's log file."""
    from prefect.logging.handlers import PrefectConsoleHandler

    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.Logger.manager.loggerDict))]
    for logger in loggers:
        for handler in list(logger.handlers):
            if isinstance(handler, PrefectConsoleHandler):
                logger.removeHandler(handler)


@contextlib.contextmanager
def answering(url: str, hint: str = "") -> Iterator[None]:
    """Turns what Prefect raises when its server cannot be reached, or refuses, into a UserError.

    hint: for a server that is gone
    """
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        yield
    except PrefectHTTPStatusError as error:
        if error.response.status_code not in (401, 403):
            raise UserError(f"the Prefect server at {url} fails: {error}", hint) from error
        # Its /health asks for no password, so that only now it shows.
        raise UserError(f"the Prefect server at {url} refuses", "set PREFECT_API_AUTH_STRING=user:password") from error
    except httpx.HTTPError as error:
        reason = error or type(error).__name__
        raise UserError(f"the Prefect server at {url} no longer answers: {reason}", hint) from error


def remember(run: RunDir, flow_run_id: str) -> None:
    """Keeps a flow run's id with the run, to find it again after a kill."""
    with explained(run.path), open(run.logs / "flow_runs.txt", "a") as file:
        file.write(flow_run_id + "\n")


def remembered(run: RunDir) -> list[str]:
    try:
        return (run.logs / "flow_runs.txt").read_text().split()
    except OSError:
        return []


def rename(flow_run_id: str, name: str) -> None:
    """Shows a flow run under this name."""
    from uuid import UUID

    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.update_flow_run(UUID(flow_run_id), name=name)


def crash_leftovers(run: RunDir, *, but: str = "") -> int:
    """Sets flow runs of this run that a kill left `Running`, and their tasks, to Crashed; returns how many flow runs.

    Call it holding the run's lock: then no other process can be running them. but: the flow run that calls.
    """
    ids = [each for each in remembered(run) if each != but]
    if not ids:
        return 0
    from uuid import UUID

    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterId,
        TaskRunFilter,
        TaskRunFilterState,
        TaskRunFilterStateType,
    )
    from prefect.client.schemas.objects import TERMINAL_STATES, StateType
    from prefect.states import Crashed

    message = "the process was killed; a later start goes on with the run"
    # The server lists 200 at most, and a long run has more that are done.
    states = TaskRunFilterStateType(any_=[each for each in StateType if each not in TERMINAL_STATES])
    unfinished = TaskRunFilter(state=TaskRunFilterState(type=states))
    count = 0
    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(each) for each in ids[-100:]]))
        for flow_run in client.read_flow_runs(flow_run_filter=wanted):
            if flow_run.state is None or flow_run.state.is_final():
                continue
            of_run = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
            for task_run in client.read_task_runs(flow_run_filter=of_run, task_run_filter=unfinished):
                client.set_task_run_state(task_run.id, Crashed(message=message), force=True)
            client.set_flow_run_state(flow_run.id, Crashed(message=message), force=True)
            count += 1
    return count
