"""The sandbox with real Docker: verdicts, limits, replaced containers, speed, what is said when Docker is missing."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

import stages.sandbox.pool
from stages.config import SandboxConfig, UserError
from stages.sandbox import Job, Limits, Outcome, Result, SandboxError, SandboxPool, container, open_pool, reap
from stages.sandbox.container import host_config
from stages.sandbox.image import connect
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.docker

LABELS = {"flexsink.run": f"test-sandbox-{os.getpid()}"}
HALVING = "def guess(low, high):\n    return (low + high) // 2\n"
HARNESS = '''
def judge(cases, ask):
    """The judge thinks of a number, the program guesses it: tells it the bounds that are left."""
    rows = []
    for case in cases:
        if case["secret"] == "broken":
            raise KeyError("a bug in the judge")
        low, high, tries = 0, 128, 0
        while tries < 20:
            tries += 1
            try:
                answer = ask(bytes([low, high]))
            except CaseEnded:
                return rows
            guess = answer[0] if len(answer) == 1 else -1
            if guess == case["secret"]:
                break
            low, high = (max(low, guess + 1), high) if guess < case["secret"] else (low, min(high, guess))
        rows.append({"tries": tries})
    return rows

def serve(function, receive, send):
    while question := receive():
        send(bytes([function(question[0], question[1])]))
'''
LOCKSTEP = """
def judge(cases, ask):
    boards = bytes(range(16)) * 16
    for _ in range(cases[0]["rounds"]):
        if ask(boards) != b"W" * 16:
            return []
    return [{"moves": 16 * cases[0]["rounds"]}]

def serve(function, receive, send):
    while question := receive():
        size = len(question) // 16
        send(b"".join([function(question[n * size : n * size + size]) for n in range(16)]))
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    config = SandboxConfig(containers=1)
    with open_pool(config, harnesses={"guess": HARNESS, "lockstep": LOCKSTEP}, labels=LABELS) as opened:
        yield opened


def guessing(program: str, *secrets: object, limits: Limits | None = None) -> Job:
    return Job(
        job_id="00000-000-000",
        program=program,
        entry="guess",
        harness="guess",
        cases=tuple({"secret": secret} for secret in secrets or (37,)),
        limits=limits or Limits(cpu_s=1.0),
    )


def judged(pool: SandboxPool, program: str, *secrets: object, limits: Limits | None = None) -> Result:
    return pool.submit(guessing(program, *secrets, limits=limits)).result(timeout=PATIENCE_S)


def own_containers(**labels: str) -> list[dict]:
    client = connect()
    wanted = [f"{name.replace('_', '.')}={value}" for name, value in labels.items()]
    return client.containers(all=True, filters={"label": wanted})


def test_an_honest_program_gets_the_verdict_that_its_guesses_earn(pool: SandboxPool) -> None:
    result = judged(pool, HALVING, 64, 32, 0, 127)
    assert result.outcome is Outcome.ok
    assert result.job_id == "00000-000-000"
    assert [row["tries"] for row in result.cases] == [
        1,
        2,
        8,
        7,
    ]  # halving 0..128 by hand: 64; 64 32; 64 32 .. 0; 64 96 .. 127
    assert 0 < result.cpu_s < 0.5


def test_the_verdict_is_the_same_in_another_container(pool: SandboxPool) -> None:
    program = "import random\ndef guess(low, high):\n    return random.Random().randrange(low, high)\n"
    first = judged(pool, program, 5, 90, 17).cases
    with open_pool(SandboxConfig(containers=1), harnesses={"guess": HARNESS}, labels=LABELS) as other:
        assert judged(other, program, 5, 90, 17).cases == first


def test_a_program_that_fails_midway_keeps_the_rows_its_judge_had_written(pool: SandboxPool) -> None:
    result = judged(pool, "def guess(low, high):\n    return 64 if high == 128 and low == 0 else 1 // 0\n", 64, 64, 3)
    assert (result.outcome, len(result.cases)) == (Outcome.crash, 2)
    assert result.detail == "ZeroDivisionError: integer division or modulo by zero (line 2)"


def test_details_hold_no_addresses_and_no_control_characters(pool: SandboxPool) -> None:
    program = "def guess(low, high):\n    raise ValueError(f'{object()} \\x1b[2J\\n\\u202e')\n"
    result = judged(pool, program)
    assert result.detail == "ValueError: <object object at 0x...>  [2J   (line 2)"


def test_state_of_one_program_is_not_seen_by_the_next(pool: SandboxPool) -> None:
    judged(pool, "import math, random\nmath.floor = lambda x: 0\nrandom.spoiled = True\n" + HALVING)
    program = "import math, random\nassert math.floor(2.5) == 2 and not hasattr(random, 'spoiled')\n" + HALVING
    assert judged(pool, program).outcome is Outcome.ok


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("def guess(low, high:\n", Outcome.syntax_error),
        ("return 3\n", Outcome.syntax_error),
        ("import numpy\n", Outcome.foreign_import),
        ("def guess(low, high):\n    return low.__class__\n", Outcome.cheat),
        ("def guess(low, high):\n    while True: pass\n", Outcome.timeout),
        ("def guess(low, high):\n    return [0] * 10 ** 12\n", Outcome.memory),
        ("def guess(low, high):\n    return 1 / 0\n", Outcome.crash),
        ("def other(low, high):\n    return 1\n", Outcome.crash),
    ],
)
def test_each_way_to_fail_has_its_outcome(pool: SandboxPool, program: str, outcome: Outcome) -> None:
    result = judged(pool, program, limits=Limits(cpu_s=0.3, wall_s=20))
    assert result.outcome is outcome
    assert result.detail


@pytest.mark.parametrize(
    "program",
    [
        "from __future__ import annotations\n" + HALVING,
        "from typing import *\nimport collections.abc, itertools as it\nfrom collections.abc import Sequence\n"
        + HALVING,
        "from functools import lru_cache\n@lru_cache(None)\n" + HALVING,
        "class Mind:\n    def __init__(self):\n        self.__n = 0\n    def __call__(self, low, high):\n"
        "        self.__n += 1\n        return (low + high) // 2\nguess = Mind()\n",
        "import random\nrandom.seed()\nrandom.SystemRandom().random()\n" + HALVING,
        "print('thinking')\nif __name__ == '__main__':\n    guess(1, 2)\n" + HALVING,
        "open = 3\ndef compile(x):\n    return x\nvars = compile(open)\n" + HALVING,
        "'a docstring'\nx = '\\d' is not 'é'\n" + HALVING,
        "import copy, heapq, math\nh = []\nheapq.heappush(h, copy.deepcopy([math.inf]))\n" + HALVING,
        "from collections import namedtuple, Counter, deque\nP = namedtuple('P', 'x y')\nP(1, y=2)\n" + HALVING,
        "from typing import NamedTuple\nclass P(NamedTuple):\n    x: int = 0\nP(3)\n" + HALVING,
        "match [1, 2]:\n    case [a, *rest]:\n        pass\n" + HALVING,
        "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    message = f'{error!r:>40}'\n" + HALVING,
        "def tree(n):\n    yield from (tree(n - 1) if n else [0])\nlist(tree(50))\n" + HALVING,
        "class A:\n    def __del__(self):\n        1 / 0\nA()\n" + HALVING,
        "import typing\ntyping.reveal_type(3)\n" + HALVING,
        "async def never():\n    pass\nnever()\n" + HALVING,
        "def gen():\n    try:\n        yield 1\n    finally:\n        1 / 0\nnext(gen())\n" + HALVING,
        "x = [i for i in range(10 ** 6)]\ndel x\n" + HALVING,
    ],
)
def test_odd_but_honest_programs_are_judged_like_any_other(pool: SandboxPool, program: str) -> None:
    result = judged(pool, program, 37)
    assert (result.outcome, result.detail) == (Outcome.ok, "")
    assert result.cases == ({"tries": 7},)  # 64 32 48 40 36 38 37


def test_a_bug_in_the_judge_is_an_error_of_the_sandbox_and_not_a_verdict(pool: SandboxPool) -> None:
    with pytest.raises(UserError, match="a bug in the judge") as raised:
        judged(pool, HALVING, "broken")
    assert "\n" not in raised.value.message
    assert "flexsink resume" in raised.value.hint
    assert judged(pool, HALVING).outcome is Outcome.ok


def test_a_container_killed_under_a_job_is_replaced_and_the_job_judged(pool: SandboxPool) -> None:
    slow = "def guess(low, high):\n    for _ in range(10 ** 8): pass\n    return (low + high) // 2\n"
    future = pool.submit(guessing(slow, 64, 64, limits=Limits(cpu_s=60, wall_s=120)))
    while not (pool.live and future.running()):
        time.sleep(0.01)
    time.sleep(0.3)
    assert not future.done()
    before = pool.num_started
    connect().remove_container(next(iter(pool.live)).id, force=True)
    result = future.result(timeout=PATIENCE_S)
    assert result.outcome is Outcome.ok
    assert [row["tries"] for row in result.cases] == [1, 1]
    assert pool.num_started == before + 1


def test_after_three_failures_the_job_raises(pool: SandboxPool, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def fail(self: object, job: Job) -> None:
        attempts.append(job.job_id)
        raise SandboxError("no verdict")

    monkeypatch.setattr(stages.sandbox.pool.Container, "judge", fail)
    with pytest.raises(SandboxError, match="no verdict"):
        judged(pool, HALVING)
    assert len(attempts) == 3


def test_a_daemon_that_goes_away_is_an_error_and_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_pool(SandboxConfig(containers=1), harnesses={"guess": HARNESS}, labels=LABELS) as pool:
        judged(pool, HALVING)
        monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
        next(iter(pool.live)).hang_up()
        monkeypatch.setattr(container, "AWAY_S", 0.5)
        with pytest.raises(SandboxError, match="no Docker daemon answers") as raised:
            judged(pool, HALVING)
        assert raised.value.hint == SandboxError("").hint


def test_a_daemon_that_is_restarted_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_pool(SandboxConfig(containers=1), harnesses={"guess": HARNESS}, labels=LABELS) as pool:
        judged(pool, HALVING)
        back = time.monotonic() + 3

        def restarting() -> Any:
            if time.monotonic() < back:
                raise UserError("no Docker daemon answers")
            return connect()

        monkeypatch.setattr(container, "connect", restarting)
        next(iter(pool.live)).hang_up()
        assert judged(pool, HALVING).outcome is Outcome.ok
        assert time.monotonic() > back


def test_a_container_is_recycled_after_its_number_of_jobs() -> None:
    config = SandboxConfig(containers=1)
    with SandboxPool(config, harnesses={"guess": HARNESS}, labels=LABELS, jobs_per_container=3) as pool:
        for _ in range(7):
            assert judged(pool, HALVING).outcome is Outcome.ok
        assert pool.num_started == 3


def test_replacing_containers_leaves_no_descriptor_open() -> None:
    config = SandboxConfig(containers=1)
    with SandboxPool(config, harnesses={"guess": HARNESS}, labels=LABELS, jobs_per_container=1) as pool:
        counts = []
        for _ in range(8):
            judged(pool, HALVING)
            pool.undertaker.submit(int).result()  # the container before is gone
            counts.append(len(os.listdir("/proc/self/fd")))
    assert max(counts[4:]) <= max(counts[:4]) + 1, counts


def test_a_container_has_no_network_no_writable_root_and_three_capabilities(pool: SandboxPool) -> None:
    judged(pool, HALVING)
    config = connect().inspect_container(next(iter(pool.live)).id)["HostConfig"]
    assert config["NetworkMode"] == "none"
    assert config["ReadonlyRootfs"] is True
    assert config["CapDrop"] == ["ALL"]
    assert sorted(name.removeprefix("CAP_") for name in config["CapAdd"]) == ["KILL", "SETGID", "SETUID"]
    assert config["IpcMode"] == "none"
    assert config["Init"] is True
    assert 0 < config["Memory"] == config["MemorySwap"] <= 512 << 20
    assert 0 < config["PidsLimit"] <= 16
    assert any(option.startswith("no-new-privileges") for option in config["SecurityOpt"])
    assert any(option.startswith("seccomp=") and "clone3" in option for option in config["SecurityOpt"])


def test_even_the_supervisor_is_refused_what_no_sandbox_needs() -> None:
    numbers = {  # x86_64, from the kernel's table
        "socket": 41,
        "ptrace": 101,
        "mount": 165,
        "keyctl": 250,
        "unshare": 272,
        "perf_event_open": 298,
        "bpf": 321,
        "userfaultfd": 323,
        "io_uring_setup": 425,
        "clone3": 435,
        "pidfd_getfd": 438,
        "process_vm_readv": 310,
        "chroot": 161,
    }
    script = f"""
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
passed = []
for name, number in {numbers!r}.items():
    ctypes.set_errno(0)
    libc.syscall(number, 0, 0, 0, 0, 0, 0)
    if ctypes.get_errno() != (errno.ENOSYS if name == "clone3" else errno.EPERM):
        passed.append(name)
for path in ("/flexsink/x", "/tmp/x", "/dev/shm/x", "/proc/sys/kernel/core_pattern"):
    try:
        open(path, "w")
        passed.append(path)
    except OSError:
        pass
try:
    os.chown("/proc/self", 1, 1)
    passed.append("chown")
except OSError:
    pass
sys.exit(len(passed))
"""
    client = connect()
    settings = host_config(client, memory_bytes=64 << 20, runtime="") | {"AutoRemove": False}
    image = stages.sandbox.pool.require_image(client)
    created = client.create_container(image, entrypoint=["python3", "-c", script], host_config=settings)
    try:
        client.start(created["Id"])
        assert client.wait(created["Id"])["StatusCode"] == 0
    finally:
        client.remove_container(created["Id"], force=True)


def test_reap_removes_what_a_killed_process_left_and_nothing_else(pool: SandboxPool) -> None:
    client = connect()
    image = stages.sandbox.pool.require_image(client)
    killed = f"test-killed-{os.getpid()}"
    labels = {"flexsink.sandbox": "1", "flexsink.run": killed}
    left = client.create_container(
        image,
        entrypoint=["python3", "-c", "import time; time.sleep(99)"],
        labels=labels,
        host_config=client.create_host_config(network_mode="none"),
    )
    client.start(left["Id"])
    judged(pool, HALVING)
    assert reap({"flexsink.run": killed}) == 1
    assert own_containers(flexsink_run=killed) == []
    pool.undertaker.submit(int).result()  # whom it has replaced is gone
    assert len(own_containers(flexsink_run=LABELS["flexsink.run"])) == 1
    assert reap({"flexsink.run": killed}) == 0


def test_containers_end_with_the_process_that_held_the_pool() -> None:
    run = f"test-dies-{os.getpid()}"
    program = """
import os, sys
from stages.config import SandboxConfig
from stages.sandbox import open_pool
from tests.test_sandbox import HALVING, HARNESS, guessing
pool = open_pool(SandboxConfig(containers=2), harnesses={"guess": HARNESS}, labels={"flexsink.run": sys.argv[1]})
for future in [pool.submit(guessing(HALVING)) for _ in range(8)]:
    future.result()
print("judged", flush=True)
os.kill(os.getpid(), 9)
"""
    command = [sys.executable, "-c", program, run]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout == "judged\n", done.stderr
    deadline = time.monotonic() + 60
    while (left := own_containers(flexsink_run=run)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def test_closing_the_pool_ends_running_jobs_at_once() -> None:
    run = f"test-close-{os.getpid()}"
    pool = open_pool(SandboxConfig(containers=1), harnesses={"guess": HARNESS}, labels={"flexsink.run": run})
    forever = guessing("def guess(low, high):\n    while True: pass\n", limits=Limits(cpu_s=100, wall_s=100))
    running, waiting = pool.submit(forever), pool.submit(forever)
    deadline = time.monotonic() + 300
    while not running.running() and time.monotonic() < deadline:
        time.sleep(0.1)
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 50  # the job has 100 s
    assert waiting.cancelled()
    with pytest.raises(SandboxError):
        running.result(timeout=60)
    assert own_containers(flexsink_run=run) == []


def test_a_missing_daemon_is_one_line_and_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with pytest.raises(UserError, match="no Docker daemon answers") as raised:
        open_pool(SandboxConfig(), harnesses={"guess": HARNESS}, labels=LABELS)
    assert "bootstrap.sh" in raised.value.hint
    assert "\n" not in raised.value.message


def test_a_missing_image_or_runtime_is_one_line_and_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no runtime gvisor") as raised:
        open_pool(SandboxConfig(runtime="gvisor"), harnesses={}, labels=LABELS)
    assert "sandbox.runtime" in raised.value.hint
    monkeypatch.setattr("stages.sandbox.image.image_name", lambda: "flexsink-sandbox:missing")
    with pytest.raises(UserError, match="flexsink-sandbox:missing is missing") as raised:
        open_pool(SandboxConfig(), harnesses={}, labels=LABELS)
    assert "bootstrap.sh" in raised.value.hint


def test_an_unknown_harness_is_refused_before_anything_runs(pool: SandboxPool) -> None:
    with pytest.raises(ValueError, match="no harness chess"):
        pool.submit(Job(job_id="x", program="", entry="f", harness="chess", cases=()))


@pytest.mark.timed
def test_a_trivial_program_is_judged_in_at_most_twice_20_ms(pool: SandboxPool) -> None:
    for _ in range(20):
        judged(pool, HALVING)
    medians = []
    for _ in range(5):
        times = []
        for _ in range(200):
            start = time.perf_counter()
            judged(pool, HALVING)
            times.append(time.perf_counter() - start)
        medians.append(statistics.median(times))
    print(f"\na trivial program: {1e3 * statistics.median(medians):.2f} ms (bar 20)")
    assert statistics.median(medians) < 2 * 0.020


@pytest.mark.timed
def test_supervisor_and_pipe_use_at_most_twice_20_us_of_cpu_a_move(pool: SandboxPool) -> None:
    rounds = 2000
    job = Job(
        job_id="moves",
        program="def move(board):\n    return b'W'\n",
        entry="move",
        harness="lockstep",
        cases=({"rounds": rounds},),
    )
    figures = []
    for _ in range(5):
        result = pool.submit(job).result(timeout=PATIENCE_S)
        assert result.cases == ({"moves": 16 * rounds},)
        figures.append((result.cpu_s + result.supervisor_cpu_s) / (16 * rounds))
    print(
        f"\nsupervisor, pipe and a program that does nothing: {1e6 * statistics.median(figures):.2f} us a move (bar 20)"
    )
    assert statistics.median(figures) < 2 * 20e-6


@pytest.mark.timed
def test_a_cold_container_answers_in_at_most_twice_400_ms() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with open_pool(SandboxConfig(containers=1), harnesses={"guess": HARNESS}, labels=LABELS) as pool:
            judged(pool, HALVING)
            times.append(time.perf_counter() - start)
    print(f"\na cold container and its first verdict: {1e3 * statistics.median(times):.0f} ms (bar 400)")
    assert statistics.median(times) < 2 * 0.4
