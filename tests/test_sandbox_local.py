"""The backend local: real namespaces, Landlock and seccomp, as root and as a user without any right."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import doctor, steps
from flows.config import overridden
from flows.presets import tiny
from stages.config import SandboxConfig, UserError
from stages.sandbox import Job, local, open_pool, reap
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the backend local is made of Linux's walls")

ROOT = Path(__file__).parents[1]
NOBODY = 65534
KINDS = ("namespaces", "landlock")
PLAIN_PYTHON = "/usr/bin/python3"  # a user without rights may not reach the Python of the test's own environment

# What the supervisor itself may do: its judge tries everything.
LOOK = """
def judge(cases, ask):
    import ctypes, os, socket
    libc = ctypes.CDLL(None, use_errno=True)
    def attempt(action):
        try:
            return repr(action())
        except Exception as error:
            return type(error).__name__
    def call(*arguments):
        libc.syscall.restype = ctypes.c_long
        return "done" if libc.syscall(*arguments) >= 0 else os.strerror(ctypes.get_errno())
    row = {
        "root": attempt(lambda: os.listdir("/")),
        "etc": attempt(lambda: open("/etc/passwd").read()),
        "home": attempt(lambda: os.listdir(os.path.expanduser("~"))),
        "library": attempt(lambda: open(os.__file__).read(1) and "read"),
        "change": attempt(lambda: open(os.__file__, "ab")),
        "tmp": attempt(lambda: open("/tmp/flexsink-test", "w")),
        "null": attempt(lambda: open("/dev/null")),
        "socket": attempt(socket.socket),
        "unix": attempt(lambda: socket.socket(socket.AF_UNIX)),
        "run": attempt(lambda: os.execv("/bin/true", ["true"])),
        "warden": attempt(lambda: os.kill(os.getppid() or 10 ** 6, 0)),
        "user namespace": call(272, 0x10000000),
        "mount": call(165, b"none", b"/", b"tmpfs", 0, 0),
        "ptrace": call(101, 16, 2, 0, 0),
        "io_uring": call(425, 8, 0),
        "bpf": call(321, 0, 0, 0),
        "keyctl": call(250, 0, -3, 0),
        "userfaultfd": call(323, 0),
        "perf_event_open": call(298, 0, 0, -1, -1, 0),
        "clone3": call(435, 0, 0),
        "environment": sorted(os.environ),
        "pid": os.getpid(),
        "uid": os.getuid(),
        "dumpable": libc.prctl(3, 0, 0, 0, 0),
        "no new privileges": libc.prctl(39, 0, 0, 0, 0),
        "bounding": [n for n in range(41) if libc.prctl(23, n, 0, 0, 0) == 1],
    }
    return [row]

def serve(function, receive, send):
    while question := receive():
        send(b"")
"""
ECHO = """
def judge(cases, ask):
    return [{"answer": ask(str(case).encode()).decode()} for case in cases]

def serve(function, receive, send):
    while question := receive():
        send(str(function(question.decode())).encode())
"""
HONEST = "def say(question):\n    return question.upper()\n"
LETTERS = "\u540d = '\\N{DIGIT ONE}'\ndef say(\uff58):\n    return \u540d + x\n"


def doing(body: str) -> str:
    return "def say(question):\n" + "".join(f"    {line}\n" for line in body.splitlines())


TRIES = """
import ctypes, os, socket, signal
libc = ctypes.CDLL(None, use_errno=True)
def attempt(action):
    try:
        return repr(action())
    except Exception as error:
        return type(error).__name__
def say(question):
    return repr({
        "uid": os.getuid(),
        "file": attempt(lambda: open("/etc/passwd").read()),
        "library": attempt(lambda: open(os.__file__).read(1)),
        "supervisor": attempt(lambda: os.kill(os.getppid(), 0)),
        "socket": attempt(socket.socket),
        "trace": libc.ptrace(16, os.getppid(), 0, 0),
        "memory": libc.process_vm_readv(os.getppid(), 0, 0, 0, 0, 0),
        "descriptors": [n for n in range(64) if attempt(lambda: os.fstat(n)) != "OSError"],
    })
"""
KILL_ALL = doing("import os\ntry:\n    os.kill(-1, 9)\nexcept OSError:\n    pass\nreturn question.upper()")
DAEMON = doing(
    "import os\nif not os.fork():\n    os.close(0)\n    os.close(1)\n    if not os.fork():\n        while True: pass\n"
    "    os._exit(0)\nreturn question.upper()"
)


def echo(name: str, program: str, *, guarded: bool = False, **more: Any) -> dict[str, Any]:
    cases = [{"a": 1}, {"b": 2}]
    job = {"name": name, "program": program, "entry": "say", "harness": "echo", "cases": cases, "guarded": guarded}
    return {**job, **more}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the code that everybody may read."""
    folder = Path("/tmp") / f"flexsink-local-{os.getpid()}"
    for name in ("stages", "containers"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "local_sandbox_driver.py", folder)
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
    yield folder
    shutil.rmtree(folder)


def command_of(user: str, copy: Path, *arguments: str) -> list[str]:
    """The driver's command as root or as nobody; skips what this user or this machine cannot do."""
    python = sys.executable
    prefix: list[str] = []
    if user == "root" and os.geteuid() != 0:
        pytest.skip("the tests do not run as root")
    if user == "nobody" and os.geteuid() == 0:
        if not (shutil.which("setpriv") and os.path.exists(PLAIN_PYTHON)):
            pytest.skip(f"neither setpriv nor {PLAIN_PYTHON}")
        prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        python = PLAIN_PYTHON
    return [*prefix, python, "-B", str(copy / "local_sandbox_driver.py"), *arguments]


def drive(user: str, kind: str, copy: Path, jobs: list[dict[str, Any]], *options: str) -> dict[str, Any]:
    order = json.dumps({"harnesses": {"echo": ECHO, "look": LOOK}, "jobs": jobs})
    command = command_of(user, copy, kind, *options)
    done = subprocess.run(command, input=order, cwd=copy, capture_output=True, text=True, timeout=PATIENCE_S)
    if "OSError" in done.stderr and "try_walls" in done.stderr:
        pytest.skip(f"this kernel has no {kind} for {user}: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


EVERYWHERE = [pytest.param((user, kind), id=f"{user}-{kind}") for user in ("root", "nobody") for kind in KINDS]


@pytest.fixture(scope="module", params=EVERYWHERE)
def answers(request: pytest.FixtureRequest, copy: Path) -> dict[str, Any]:
    """What came of these jobs in one sandbox, one after the other."""
    user, kind = request.param
    jobs = [
        echo("honest", HONEST, guarded=True),
        echo("letters", LETTERS, guarded=True),
        {**echo("look", HONEST), "harness": "look"},
        echo("opens a file", doing("return open('/etc/passwd').read()")),
        echo("forks", doing("import os\nos.fork()")),
        echo("kills", KILL_ALL),
        echo("connects", doing("import socket\nsocket.socket()")),
        echo("eats memory", doing("return 'x' * 10 ** 9")),
        echo("writes too much", doing("return 'x' * 10 ** 7"), limits={"output_bytes": 1 << 20}),
        echo("loops", doing("while True: pass")),
        echo("honest after", HONEST, guarded=True),
    ]
    return {**drive(user, kind, copy, jobs), "user": user, "kind": kind}


@pytest.fixture(scope="module", params=EVERYWHERE)
def behind(request: pytest.FixtureRequest, copy: Path) -> dict[str, Any]:
    """The same with the cases' filters open."""
    user, kind = request.param
    # Without Landlock 6 and a namespace nothing else would keep one uid's signals in: not to be tried out on a machine.
    alone = kind == "landlock" and user == "nobody" and local.try_walls(kind)["landlock"] < 6
    jobs = [echo("tries", TRIES), *([] if alone else [echo("kills", KILL_ALL)]), echo("honest", HONEST)]
    jobs += [echo("daemon", DAEMON), echo("honest after", HONEST)]
    return {**drive(user, kind, copy, jobs, "open"), "user": user, "kind": kind}


def test_programs_are_judged(answers: dict[str, Any]) -> None:
    for name in ("honest", "honest after"):
        assert answers[name]["outcome"] == "ok"
        assert answers[name]["cases"] == [{"answer": "{'A': 1}"}, {"answer": "{'B': 2}"}]


def test_what_a_program_must_not_do_has_its_outcome(answers: dict[str, Any]) -> None:
    outcomes = {name: value["outcome"] for name, value in answers.items() if isinstance(value, dict)}
    cheats = ("opens a file", "forks", "kills", "connects")
    assert [outcomes[name] for name in cheats] == ["cheat"] * 4
    assert (outcomes["eats memory"], outcomes["writes too much"], outcomes["loops"]) == (
        "memory",
        "output_limit",
        "timeout",
    )


def test_letters_that_python_looks_up_are_no_system_call(answers: dict[str, Any]) -> None:
    assert answers["letters"]["outcome"] == "ok"
    assert answers["letters"]["cases"][0] == {"answer": "1{'a': 1}"}


def test_one_case_has_a_uid_of_its_own_where_root_can_give_it(answers: dict[str, Any]) -> None:
    assert answers["uids"] == (3 if answers["user"] == "root" else 1)


def test_the_supervisor_sees_its_library_and_nothing_else(answers: dict[str, Any]) -> None:
    (row,) = answers["look"]["cases"]
    assert row["library"] == "'read'"
    assert row["etc"] in ("FileNotFoundError", "PermissionError")
    assert row["home"] in ("FileNotFoundError", "PermissionError")
    assert row["null"] in ("FileNotFoundError", "PermissionError")
    assert row["change"] in ("OSError", "PermissionError")
    assert row["tmp"] in ("OSError", "PermissionError", "FileNotFoundError")
    assert row["environment"] in (["PYTHONHASHSEED"], ["LC_CTYPE", "PYTHONHASHSEED"])
    if answers["kind"] == "namespaces":
        assert row["pid"] == 1
    if answers["landlock"]:
        assert row["root"] == "PermissionError"


def test_the_supervisor_may_not_do_what_it_has_no_need_of(answers: dict[str, Any]) -> None:
    (row,) = answers["look"]["cases"]
    assert row["socket"] == row["unix"] == row["run"] == "PermissionError"
    refused = ("user namespace", "mount", "ptrace", "io_uring", "bpf", "keyctl", "userfaultfd", "perf_event_open")
    assert {row[name] for name in refused} == {"Operation not permitted"}
    assert row["clone3"] == "Function not implemented"
    assert (row["dumpable"], row["no new privileges"]) == (0, 1)
    if answers["uids"] > 1 or answers["kind"] == "namespaces":  # else he had none to begin with
        assert row["bounding"] == ([5, 6, 7] if answers["uids"] > 1 else [])
    if answers["kind"] == "landlock" and answers["landlock"] >= 6:
        assert row["warden"] == "PermissionError"


def test_only_the_timeout_and_the_memory_cost_a_sandbox_and_nothing_is_left(answers: dict[str, Any]) -> None:
    assert answers["started"] == 2
    assert answers["left"] == 0


def test_behind_the_filters_stand_other_walls(behind: dict[str, Any]) -> None:
    seen = eval(behind["tries"]["cases"][0]["answer"], {"__builtins__": {}})
    if behind["landlock"]:
        assert seen["file"] in ("PermissionError", "FileNotFoundError")
        assert seen["library"] == "PermissionError"
    assert seen["socket"] == "PermissionError"
    assert seen["trace"] == seen["memory"] == -1
    assert seen["descriptors"] == [0, 1]
    if behind["uids"] > 1 or behind["landlock"] >= 6:
        assert seen["supervisor"] == "PermissionError"
    assert seen["uid"] != 0


def test_a_program_without_filters_kills_nobody_and_its_daemons_end_with_its_case(behind: dict[str, Any]) -> None:
    for name in ("kills", "daemon", "honest", "honest after"):
        if name in behind:
            assert behind[name]["outcome"] == "ok", behind[name]
            assert behind[name]["cases"] == [{"answer": "{'A': 1}"}, {"answer": "{'B': 2}"}]
    # The daemon costs a sandbox where the only way to kill it is to kill all in its namespace.
    assert behind["started"] == (2 if behind["uids"] == 1 and behind["kind"] == "namespaces" else 1)
    assert behind["processes"] == 3  # warden, supervisor, nursery
    assert behind["left"] == 0


@pytest.fixture
def late_warden(copy: Path) -> Iterator[None]:
    """A busy machine: the case runs before the warden has come to where it waits for the end."""
    jail = copy / "containers" / "sandbox" / "jail.py"
    text = jail.read_text()
    assert text.count("    guard(child") == 1
    jail.write_text(text.replace("    guard(child", '    __import__("time").sleep(2)\n    guard(child'))
    yield
    jail.write_text(text)


@pytest.mark.usefixtures("late_warden")
def test_a_run_killed_before_the_warden_waits_leaves_no_process(copy: Path) -> None:
    test_a_killed_run_leaves_no_process("nobody", "landlock", copy)


@pytest.mark.parametrize(("user", "kind"), [("root", "namespaces"), ("nobody", "namespaces"), ("nobody", "landlock")])
def test_a_killed_run_leaves_no_process(user: str, kind: str, copy: Path) -> None:
    limits = {"cpu_s": 600.0, "wall_s": 600.0}
    order = {"harnesses": {"echo": ECHO}, "jobs": [echo("endless", doing("while True: pass"), limits=limits)]}
    command = command_of(user, copy, kind)
    with subprocess.Popen(
        command, cwd=copy, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        run.stdin.write(json.dumps(order).encode())
        run.stdin.close()
        line = run.stdout.readline()
        if not line:
            pytest.skip(f"this kernel has no {kind} for {user}")
        assert line == b"running 4\n"  # warden, supervisor, nursery, case
        run.send_signal(signal.SIGKILL)
        end = time.monotonic() + 30  # on a busy machine the dying wait for their turn, too
        while running(copy) and time.monotonic() < end:
            time.sleep(0.02)
        left = running(copy)
        assert left == [], "\n".join(Path(f"/proc/{pid}/status").read_text() for pid in left)


def running(copy: Path) -> list[str]:
    """Returns the pids of processes started from that folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes()
            state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(copy).encode() in text and state != "Z":
            found.append(path.parent.name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_attack_comes_to_nothing_where_the_user_has_no_rights(kind: str, copy: Path) -> None:
    assert drive("nobody", kind, copy, [], "attack") == {}


def test_where_namespaces_are_off_landlock_takes_over_and_says_why(copy: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(copy)!r}); from stages.sandbox import local; print(local.find_walls())"
    )
    shell = f'echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} -B -c "$1"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", shell, "sh", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    if "unshare failed" in done.stderr:
        pytest.skip("no user namespaces here")
    assert done.stdout.startswith("no namespaces, one uid, Landlock"), done.stderr


def test_a_sandbox_that_is_killed_in_mid_run_loses_no_job() -> None:
    try:
        local.find_walls()
    except UserError as error:
        pytest.skip(error.message)
    slow = "def say(question):\n    for _ in range(10 ** 7):\n        pass\n    return question.upper()\n"
    with open_pool(SandboxConfig(backend="local", containers=1), harnesses={"echo": ECHO}, labels={}) as pool:
        answer = pool.submit(Job(job_id="1", **job_of(slow)))
        while not (pool.live and answer.running()):
            time.sleep(0.005)
        (sandbox,) = pool.live
        assert isinstance(sandbox, local.LocalSandbox)
        sandbox.warden.kill()
        assert answer.result(timeout=PATIENCE_S).cases == ({"answer": "{'A': 1}"}, {"answer": "{'B': 2}"})
        assert pool.num_started == 2


def job_of(program: str) -> dict[str, Any]:
    job = echo("", program, guarded=True)
    return {**{name: value for name, value in job.items() if name != "name"}, "cases": tuple(job["cases"])}


def test_subordinate_ids_are_this_users_and_at_least_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(local.FOLDER))
    jail = importlib.import_module("jail")
    table = tmp_path / "subuid"
    table.write_text(f"somebody:100000:65536\n{os.getuid()}:200000:1\n{os.getuid()}:300000:2\n")
    assert jail.subordinate(str(table)) == 300000
    table.write_text("somebody:100000:65536\n")
    assert jail.subordinate(str(table)) == jail.subordinate(str(tmp_path / "none")) == 0


def refuse(kind: str) -> dict[str, int]:
    raise OSError(f"the {kind} wall fell")


def test_too_little_of_a_kernel_is_refused_with_its_reasons() -> None:
    with pytest.raises(UserError, match="this kernel gives too little") as raised:
        local.find_walls(refuse)
    assert "namespaces: the namespaces wall fell; landlock: the landlock wall fell" in raised.value.message
    assert "max_user_namespaces" in raised.value.hint
    assert "docker" in raised.value.hint


def test_the_second_best_walls_name_what_the_best_lack() -> None:
    def attempt(kind: str) -> dict[str, int]:
        return {"uids": 1, "landlock": 3} if kind == "landlock" else refuse(kind)

    walls = local.find_walls(attempt)
    assert str(walls) == "no namespaces, one uid, Landlock 3, seccomp"
    assert walls.lacking == {"namespaces": "the namespaces wall fell"}
    assert len(walls.limitations()) == len(local.LIMITATIONS) + 2


def test_local_is_never_chosen_by_itself_and_docker_is_never_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with pytest.raises(UserError, match="no Docker daemon answers") as raised:
        open_pool(SandboxConfig(), harnesses={}, labels={})
    assert "sandbox.backend=local" in raised.value.hint
    with pytest.raises(UserError, match="no Docker daemon answers"):
        steps.check_sandbox("docker")
    assert reap({"flexsink.run": "test-local"}, backend="local") == 0
    try:
        local.find_walls()
    except UserError as error:
        pytest.skip(error.message)
    steps.check_sandbox("local")
    open_pool(SandboxConfig(backend="local"), harnesses={"echo": ECHO}, labels={}).close()


def test_the_configuration_knows_two_backends_and_local_takes_no_runtime() -> None:
    assert overridden(tiny(), ["sandbox.backend=local"]).sandbox.backend == "local"
    with pytest.raises(UserError, match="backend"):
        overridden(tiny(), ["sandbox.backend=podman"])
    with pytest.raises(UserError, match="runsc is Docker's"):
        open_pool(SandboxConfig(backend="local", runtime="runsc"), harnesses={}, labels={})


def test_the_doctor_says_whether_local_would_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "sandbox.backend=local would" in doctor.local_sandbox().detail
    monkeypatch.setattr(local, "try_walls", refuse)
    monkeypatch.setattr(local.find_walls, "__defaults__", (refuse,))
    line = doctor.local_sandbox()
    assert line.ok
    assert "would not work: this kernel gives too little" in line.detail
    assert line.hint
