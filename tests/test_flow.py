"""The loop, the steps and Prefect: with small stages that write real artifacts, a real server and no mocks."""

import http.server
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import server
from flows.config import overridden, resolved
from flows.plan import show_run, warnings
from flows.presets import preset
from flows.progress import Lines
from flows.steps import local
from flows.summary import Summary
from flows.train import loop, stages_of
from stages.artifacts import RunDir, Session, StageId, survey
from stages.config import RunConfig, UserError, replace
from tests import small_stages
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parent.parent
CONFIG = resolved(preset("tiny_test"))


@pytest.fixture(autouse=True)
def _small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load", "rollout", "score", "update", "evaluate", "export"):
        monkeypatch.setitem(sys.modules, f"stages.{name}", sys.modules.get(f"stages.{name}"))
    small_stages.install()


def run_locally(run: RunDir, config: RunConfig, view: Lines | None = None) -> list[dict[str, str]]:
    with Session() as session, view or Lines(open(os.devnull, "w")) as lines:
        step = local(run, config, session, lines)
        references: list[dict[str, str]] = []
        loop(config, lambda stage: references.append(step(stage)))
    return references


def contents(run: RunDir) -> dict[str, str]:
    """Content digest of every published stage by its folder."""
    paths = [path.relative_to(run.path).parent for path in run.path.rglob("manifest.json")]
    folders = sorted(path for path in paths if not path.name.startswith("."))
    return {str(path): json.loads((run.path / path / "manifest.json").read_text())["digest"] for path in folders}


def test_the_order_of_stages_is_that_of_the_design() -> None:
    config = replace(replace(CONFIG, "train", iterations=4), "evaluate", every=2)
    assert [str(stage) for stage in stages_of(config)] == [
        "load", "evaluate 0",
        "rollout 0", "score 0", "update 0", "rollout 1", "score 1", "update 1", "evaluate 2",
        "rollout 2", "score 2", "update 2", "rollout 3", "score 3", "update 3", "evaluate 4", "export mxfp4",
    ]  # fmt: skip


def test_a_run_is_the_same_made_twice_and_all_of_it_is_reused(tmp_path: Path) -> None:
    first, second = (RunDir.create(tmp_path / name, CONFIG) for name in ("a", "b"))
    references = run_locally(first, CONFIG)
    run_locally(second, CONFIG)
    assert contents(first) == contents(second)
    assert references[0]["digest"] == first.manifest(StageId("load")).digest  # type: ignore[union-attr]
    actions = [decision.action for _, decision in survey(first, CONFIG, list(stages_of(CONFIG)))]
    assert actions == ["REUSE"] * 10
    inodes = {path: path.stat().st_ino for path in first.path.rglob("*")}
    run_locally(first, CONFIG)
    assert {path: path.stat().st_ino for path in first.path.rglob("*")} == inodes


def test_a_run_of_another_task_goes_through_the_same_stages_and_is_told_in_its_own_words(tmp_path: Path) -> None:
    config = resolved(overridden(preset("tiny_test"), ["task.name=matmul"]))
    run = RunDir.create(tmp_path / "run", config)
    run_locally(run, config)
    assert [decision.action for _, decision in survey(run, config, list(stages_of(config)))] == ["REUSE"] * 10
    last = Summary.of(run).lines()[-1]
    assert last.startswith("2 updates   speed-up ")
    assert "right 0.0 %" in last


def test_another_seed_makes_another_run(tmp_path: Path) -> None:
    other = replace(CONFIG, "train", seed=1)
    first, second = RunDir.create(tmp_path / "a", CONFIG), RunDir.create(tmp_path / "b", other)
    run_locally(first, CONFIG)
    run_locally(second, other)
    differing = {name for name, digest in contents(first).items() if contents(second)[name] != digest}
    assert differing == set(contents(first))


def test_more_iterations_reuse_those_that_are_done(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", CONFIG)
    run_locally(run, CONFIG)
    longer = replace(CONFIG, "train", iterations=3)
    decisions = survey(run, longer, list(stages_of(longer)))
    assert [str(stage) for stage, decision in decisions if decision.action == "RUN"] == [
        "rollout 2", "score 2", "update 2", "evaluate 3", "export mxfp4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "follows"),
    [
        (StageId("rollout", 1), ["score 1", "update 1", "evaluate 2", "export mxfp4"]),
        (StageId("evaluate", 2), ["export mxfp4"]),
        (StageId("export", 2, "mxfp4"), []),
    ],
)
def test_damage_plans_its_stage_and_what_follows_and_runs_only_its_stage(
    tmp_path: Path, stage: StageId, follows: list[str]
) -> None:
    run = RunDir.create(tmp_path / "run", CONFIG)
    run_locally(run, CONFIG)
    before = contents(run)
    inodes = {name: Path(run.path, name).stat().st_ino for name in before}
    victim = next(path for path in sorted(run.folder(stage).iterdir()) if path.name != "manifest.json")
    body = bytearray(victim.read_bytes())
    body[len(body) // 2] ^= 16
    victim.write_bytes(body)
    planned = [str(each) for each, decision in survey(run, CONFIG, list(stages_of(CONFIG))) if decision.action == "RUN"]
    assert planned == [str(stage), *follows]
    run_locally(run, CONFIG)
    assert contents(run) == before
    changed = {name for name in before if Path(run.path, name).stat().st_ino != inodes[name]}
    assert changed == {str(stage.folder)}


def test_the_loop_needs_no_prefect() -> None:
    program = """
        import sys
        sys.modules["prefect"] = None
        from flows.train import loop, stages_of
        from flows.steps import local
        from flows.presets import tiny_test
        print(len(list(stages_of(tiny_test()))))
    """
    code = "\n".join(line.strip() for line in program.splitlines())
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("10", "")


def test_plan_warns_where_code_or_versions_differ(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", CONFIG)
    run_locally(run, CONFIG)
    decisions = survey(run, CONFIG, list(stages_of(CONFIG)))
    assert warnings(decisions, "game2048") == []
    path = run.folder(StageId("score", 0)) / "manifest.json"
    body = json.loads(path.read_text())
    body["recorded"]["versions"]["torch"] = "1.0"
    body["recorded"]["code"] = "0" * 64
    path.write_text(json.dumps(body))
    decisions = survey(run, CONFIG, list(stages_of(CONFIG)))
    assert all(decision.action == "REUSE" for _, decision in decisions)
    lines = warnings(decisions, "game2048")
    assert len(lines) == 2
    assert any("score 0 was made with other code" in line for line in lines)
    assert any("score 0 was made with torch 1.0, now" in line for line in lines)


def test_a_run_killed_before_any_change_on_its_disk_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    # All of the hundred places, or a quarter of them that is another one each time.
    first, every = (0, 1) if int(os.environ.get("FLEXSINK_KILLS", "3")) >= 20 else (time.time_ns() % 4, 4)
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path  # thousands of fsyncs
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        command = [sys.executable, "-m", "tests.killed_run", folder, str(first), str(every)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["problems"] == {}, f"from {first} every {every}"
    for stage in stages_of(CONFIG):
        assert any(change.startswith(f"os.rename {stage.folder.parent / '.tmp-'}") for change in found["changes"])


# What follows runs the command in a process of its own, against a real Prefect server.


def flexsink(*words: str, url: str, cwd: Path, mood: str = "", start: bool = False) -> Any:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"PREFECT_API_URL": url, "PYTHONPATH": f"{cwd}:{ROOT}", "SMALL_STAGES": mood}
    command = [sys.executable, "-m", "tests.small_stages", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    if start:
        return subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **pipes)
    return subprocess.run(command, cwd=cwd, env=environment, timeout=PATIENCE_S, **pipes)


def paused_in_rollout_1(url: str, folder: Path) -> Any:
    """A train command at work in folder/run, two of rollout 1's four completions finished."""
    words = ("train", "tiny_test", "--run-dir", "run")
    process = flexsink(*words, url=url, cwd=folder, mood="pause", start=True)
    while "pausing" not in process.stderr.readline():
        assert process.poll() is None
    return process


def ask(url: str, path: str, **body: Any) -> Any:
    """What Prefect's own HTTP interface answers."""
    request = urllib.request.Request(
        f"{url}/{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
        method="POST" if body else "GET",
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def flow_run(url: str, run: RunDir, which: int = -1) -> Any:
    return ask(url, f"flow_runs/{server.remembered(run)[which]}")


@pytest.mark.docker
def test_a_run_shows_in_prefect_with_its_tasks_rewards_and_summary(prefect_server: str, tmp_path: Path) -> None:
    done = flexsink("train", "tiny_test", "--run-dir", "run", url=prefect_server, cwd=tmp_path)
    run = RunDir(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    flow = flow_run(prefect_server, run)
    assert (flow["state_type"], flow["name"]) == ("COMPLETED", "run")
    wanted = {"flow_runs": {"id": {"any_": [flow["id"]]}}}
    deadline = time.monotonic() + 180  # the server writes task runs behind the flow's back
    while time.monotonic() < deadline:
        tasks = ask(prefect_server, "task_runs/filter", **wanted, sort="EXPECTED_START_TIME_ASC")
        if len(tasks) == 10 and all(task["state_type"] == "COMPLETED" for task in tasks):
            break
        time.sleep(0.5)
    assert [task["name"] for task in tasks] == [str(stage) for stage in stages_of(CONFIG)]
    assert {task["state_type"] for task in tasks} == {"COMPLETED"}
    artifacts = ask(prefect_server, "artifacts/filter", **wanted, limit=200)
    shown = [each for each in artifacts if each["type"] == "progress"]
    progress = {each["description"].partition(":")[0]: each["data"] for each in shown}
    assert progress == {str(stage): 100.0 for stage in stages_of(CONFIG)} | {"run": 100.0}
    descriptions = {each["description"] for each in shown}
    assert "rollout 1: 4 of 4 completions, tokens/s 100" in descriptions
    assert any(each.startswith("run: reward ") for each in descriptions)
    tables = [json.loads(each["data"]) for each in artifacts if each["type"] == "table"]
    assert sorted(len(table) for table in tables) == [1, 2]
    assert {"iteration", "reward", "completions", "ok"} == set(tables[0][0])
    assert any(each["type"] == "markdown" and "| 1 |" in each["data"] for each in artifacts)
    logs = ask(prefect_server, "logs/filter", logs={"flow_run_id": {"any_": [flow["id"]]}}, limit=200)
    assert any("rollout 1: done" in line["message"] for line in logs)


@pytest.mark.docker
def test_json_on_request_is_one_object_a_line_on_the_terminal_and_in_the_log(
    prefect_server: str, tmp_path: Path
) -> None:
    words = ("train", "tiny_test", "logging.format=json", "--run-dir", "run")
    done = flexsink(*words, url=prefect_server, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["message"] == "run run"
    finished = [event for event in events if event["event"] == "finished"]
    assert [event["stage"] for event in finished] == [str(stage) for stage in stages_of(CONFIG)]
    rollout = next(event for event in finished if event["stage"] == "rollout 1")
    assert (rollout["done"], rollout["tokens/s"]) == (4, 100.0)
    log = [json.loads(line) for line in (tmp_path / "run/logs/flexsink.log").read_text().splitlines()]
    assert any(line["message"].startswith("rollout 1: done in ") and line["level"] == "INFO" for line in log)


@pytest.mark.timed
def test_prefect_adds_less_than_50_ms_to_a_stage(prefect_server: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.orchestration", "--server", prefect_server]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["added_ms"] < 50


@pytest.mark.docker
def test_a_failing_stage_is_one_line_and_a_failed_flow_run(prefect_server: str, tmp_path: Path) -> None:
    done = flexsink("train", "tiny_test", "--run-dir", "run", url=prefect_server, cwd=tmp_path, mood="fail")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: the tokens ran out", "hint: buy more tokens"]
    run = RunDir(tmp_path / "run")
    assert flow_run(prefect_server, run)["state_type"] == "FAILED"
    done = flexsink("resume", "run", url=prefect_server, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    other = RunDir.create(tmp_path / "other", CONFIG)
    run_locally(other, CONFIG)
    assert contents(run) == contents(other)


@pytest.mark.docker
def test_after_a_kill_the_run_goes_on_and_the_old_flow_run_is_crashed(
    prefect_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = flexsink(
        "train", "tiny_test", "--run-dir", "run", url=prefect_server, cwd=tmp_path, mood="pause", start=True
    )
    while "pausing" not in process.stderr.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    run = RunDir(tmp_path / "run")
    assert flow_run(prefect_server, run)["state_type"] == "RUNNING"
    (journal,) = run.path.rglob("*.journal")
    os.link(journal, tmp_path / "kept.journal")
    show_run(run, CONFIG)
    planned = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "rollout 1 RUN not done yet; 2 completions are kept" in planned
    assert "score 1 RUN rollout 1 is not done" in planned
    assert "5 to run, 5 to reuse" in planned
    done = flexsink("resume", "run", url=prefect_server, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "reused        5 stages, the last is update 0" in done.stdout
    assert flow_run(prefect_server, run, 0)["state_type"] == "CRASHED"
    assert flow_run(prefect_server, run, 1)["state_type"] == "COMPLETED"
    pieces = [
        json.loads(line.split(" ", 1)[1])["piece"] for line in (tmp_path / "kept.journal").read_text().splitlines()
    ]
    assert pieces == [0, 1, 2, 3]
    other = RunDir.create(tmp_path / "other", CONFIG)
    run_locally(other, CONFIG)
    assert contents(run) == contents(other)


@pytest.mark.docker
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line_that_says_how_to_go_on(
    prefect_server: str, tmp_path: Path, number: signal.Signals
) -> None:
    process = flexsink(
        "train", "tiny_test", "--run-dir", "run", url=prefect_server, cwd=tmp_path, mood="pause", start=True
    )
    while "pausing" not in process.stderr.readline():
        assert process.poll() is None
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=PATIENCE_S)
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert (process.returncode, errors) == (130, f"{word}; go on with: flexsink resume run\n")
    assert not list((tmp_path / "run").rglob("iterations/00001/rollout/manifest.json"))


@pytest.mark.docker
def test_a_second_process_in_the_same_run_is_refused(prefect_server: str, tmp_path: Path) -> None:
    process = flexsink(
        "train", "tiny_test", "--run-dir", "run", url=prefect_server, cwd=tmp_path, mood="pause", start=True
    )
    while "pausing" not in process.stderr.readline():
        assert process.poll() is None
    done = flexsink("resume", "run", url=prefect_server, cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "error: run is being worked on by another process")
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=PATIENCE_S)


@pytest.mark.docker
def test_a_server_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{server.free_port()}/api"
    done = flexsink("train", "tiny_test", "--run-dir", "run", url=url, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == f"error: no Prefect server answers at PREFECT_API_URL={url}"
    assert not (tmp_path / "run").exists()


@pytest.fixture
def with_password() -> Iterator[str]:
    """The address of a server that, like Prefect's with a password, says that it is well but refuses all else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            self.rfile.read(length)
            self.send_response(200 if self.path == "/api/health" else 401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}/api"
    listening.shutdown()
    listening.server_close()


@pytest.mark.docker
def test_a_forgotten_password_is_one_line(with_password: str, tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "killed", CONFIG)
    server.remember(run, str(uuid.uuid4()))
    refused = [
        f"error: the Prefect server at {with_password} refuses",
        "hint: set PREFECT_API_AUTH_STRING=user:password",
    ]
    for words in (
        ["train", "tiny_test", "--run-dir", "run"],
        ["resume", "killed"],
        ["serve", "tiny_test", "--cron", "0 3 * * *"],
    ):
        done = flexsink(*words, url=with_password, cwd=tmp_path)
        assert (done.returncode, done.stderr.splitlines()) == (2, refused)
    assert not (tmp_path / "run").exists()


def test_the_projects_own_server_is_reached_past_a_proxy(with_password: str, tmp_path: Path) -> None:
    (tmp_path / "data/.prefect").mkdir(parents=True)
    (tmp_path / "data/.prefect/server.json").write_text(json.dumps({"url": with_password, "pid": 1}))
    code = """
        import httpx, urllib.request
        from flows import server
        url = server.connect(print)
        print(url, server.healthy(url), httpx.get(url + "/health").status_code)
        print(urllib.request.proxy_bypass("one.example"), urllib.request.proxy_bypass("two.example"))
    """
    proxy = f"http://127.0.0.1:{server.free_port()}"
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment |= {"PYTHONPATH": str(ROOT), "http_proxy": proxy, "HTTP_PROXY": proxy}
    environment |= {"no_proxy": "one.example", "NO_PROXY": "two.example"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [f"{with_password} True 200", "True True"], done.stderr


@pytest.mark.docker
@pytest.mark.slow
def test_the_local_server_is_started_once_reused_and_replaced_when_dead(tmp_path: Path) -> None:
    notes: list[str] = []
    try:
        url = server.local_server(tmp_path, notes.append)
        assert server.local_server(tmp_path, notes.append) == url
        assert notes == ["starting the project's Prefect server"]
        state = server.read_state(tmp_path)
        assert state is not None
        os.kill(state["pid"], signal.SIGKILL)
        os.waitpid(state["pid"], 0)
        other = server.local_server(tmp_path, notes.append)
        assert other != url
        assert server.healthy(other)
    finally:
        server.stop(tmp_path)
    assert not server.healthy(other)
    assert "Traceback" not in (tmp_path / "server.log").read_text()


def test_stopping_never_ends_a_process_that_only_has_the_same_id(tmp_path: Path) -> None:
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        state = {"url": "http://127.0.0.1:1/api", "pid": bystander.pid, "started": 12345}
        (tmp_path / "server.json").write_text(json.dumps(state))
        server.stop(tmp_path)
        assert bystander.poll() is None
        assert not (tmp_path / "server.json").exists()
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.docker
@pytest.mark.slow
def test_serving_trains_on_schedule_and_ends_after_so_many_runs(prefect_server: str, tmp_path: Path) -> None:
    # The run is a process of Prefect's making: it gets the small stages through sitecustomize.
    (tmp_path / "sitecustomize.py").write_text("from tests.small_stages import install\ninstall()\n")
    words = ("serve", "tiny_test", "train.seed=3", "--cron", "* * * * *", "--limit", "1", "--stop-after-runs", "1")
    done = flexsink(*words, url=prefect_server, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    run = RunDir(min((tmp_path / "data/runs").iterdir()))
    assert run.config().train.seed == 3
    actions = [decision.action for _, decision in survey(run, run.config(), list(stages_of(run.config())))]
    assert actions == ["REUSE"] * 10
    assert flow_run(prefect_server, run)["state_type"] == "COMPLETED"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--cron", "at night"], "error: 'at night' is not a cron schedule"),
        (["--cron", "* * * * *", "--limit", "0"], "error: --limit is 0"),
    ],
)
def test_a_wrong_schedule_is_refused_at_once(prefect_server: str, tmp_path: Path, words: list[str], error: str) -> None:
    done = flexsink("serve", "tiny_test", *words, url=prefect_server, cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, error)


def test_an_error_of_a_stage_that_is_a_bug_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL_STAGES", "bug")
    run = RunDir.create(tmp_path / "run", CONFIG)
    with pytest.raises(ZeroDivisionError):
        run_locally(run, CONFIG)
    monkeypatch.setenv("SMALL_STAGES", "fail")
    with pytest.raises(UserError, match="the tokens ran out"):
        run_locally(run, CONFIG)
