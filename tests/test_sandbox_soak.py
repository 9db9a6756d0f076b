"""Thousands of hostile and honest cases mixed: every verdict is right, and nothing grows: not the memory, processes and
descriptors of the process that holds the pool, of the supervisors, or of the machine.

FLEXSINK_SOAK_CASES=50000 makes it the long one (25 times CI's 2 000).
"""

import gc
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import NamedTuple

import psutil
import pytest

from stages.sandbox import Job, Limits, Outcome, Result, SandboxPool
from stages.sandbox.corpus import load
from stages.sandbox.image import connect
from stages.sandbox.self_check import HARNESS, LIMITS, ROUNDS, Pick, attack_once, limits_of
from tests.patience import PATIENCE_S
from tests.sandbox_backends import opened

pytestmark = [pytest.mark.docker, pytest.mark.slow]

CASES = int(os.environ.get("FLEXSINK_SOAK_CASES", "2000"))
COSTLY_SHARE = 0.004  # an attack that uses up a limit takes a second and its container with it
RUN = f"test-soak-{os.getpid()}"
MIB = 1 << 20
HONEST = Limits(cpu_s=20, wall_s=300, memory_bytes=LIMITS.memory_bytes)
ATTACKS = [attack for attack in load() if attack.task == "pick" and len(attack.program) < 100_000]
GUESSES = {  # honest programs, with the rounds that they win
    "def pick(numbers):\n    return numbers.index(max(numbers))\n": ROUNDS,
    "pick = lambda numbers: max(range(len(numbers)), key=numbers.__getitem__)\n": ROUNDS,
    "def pick(numbers):\n    for place, n in enumerate(numbers):\n        if all(n >= m for m in numbers):\n"
    "            return place\n": ROUNDS,
    "def pick(numbers):\n    return -1\n": 0,
}


class Use(NamedTuple):
    """What a process holds."""

    memory: int
    threads: int
    descriptors: int


def own_use(pool: SandboxPool | None = None) -> Use:
    """What this process holds; with a pool, while each of its threads has a container and no other is left."""
    if pool is not None:
        while len(pool.live) < pool.config.containers:
            for future in [pool.submit(Pick().job(next(iter(GUESSES)), limits=HONEST)) for _ in range(8)]:
                future.result(timeout=PATIENCE_S)
        pool.undertaker.submit(int).result()
    gc.collect()
    own = psutil.Process()
    return Use(own.memory_info().rss, own.num_threads(), own.num_fds())


def containers() -> list[dict]:
    client = connect()
    try:
        return client.containers(all=True, filters={"label": [f"flexsink.run={RUN}"]})
    finally:
        client.close()


def inside(container: str) -> dict[int, Use]:
    """The processes of a container by pid, as the machine sees them."""
    client = connect()
    try:
        rows = client.top(container, ps_args="-eo pid")["Processes"]
    finally:
        client.close()
    found = {}
    for (pid,) in rows:
        try:
            process = psutil.Process(int(pid))
            found[int(pid)] = Use(process.memory_info().rss, process.num_threads(), process.num_fds())
        except psutil.AccessDenied:
            found[int(pid)] = Use(process.memory_info().rss, process.num_threads(), 0)
    return found


def mixed(count: int, seed: int) -> Iterator[tuple[Job, object]]:
    """Jobs, each with what must come of it: the rounds to win, or the attack and its way in."""
    draw = random.Random(seed)
    cheap = [attack for attack in ATTACKS if not attack.costly]
    costly = [attack for attack in ATTACKS if attack.costly]
    game = Pick()
    for _ in range(count):
        if draw.random() < 0.5:
            program, rounds = draw.choice(list(GUESSES.items()))
            yield game.job(program, limits=HONEST), rounds
        else:
            attack = draw.choice(costly if draw.random() < 2 * COSTLY_SHARE else cheap)
            mode = draw.choice(list(attack.expected))
            yield game.job(attack.program, limits=limits_of(attack, mode), guarded=mode == "guarded"), (attack, mode)


def right(result: Result, expected: object) -> bool:
    if isinstance(expected, int):
        return result.outcome is Outcome.ok and result.cases[0]["right"] == expected
    attack, mode = expected  # type: ignore[misc]
    return result.outcome in attack.expected[mode].outcomes and not (
        result.outcome is Outcome.ok and result.cases[0]["right"] > attack.wins
    )


def judge(pool: SandboxPool, count: int, seed: int) -> list[str]:
    """Judges that many cases, 64 of them waiting at most; returns what was wrong."""
    wrong: list[str] = []
    waiting: list[tuple[Future[Result], Job, object]] = []
    for job, expected in mixed(count, seed):
        waiting.append((pool.submit(job), job, expected))
        if len(waiting) == 64:
            wrong += settle(waiting)
    return wrong + settle(waiting)


def settle(waiting: list) -> list[str]:
    done = [(future.result(timeout=PATIENCE_S), job, expected) for future, job, expected in waiting]
    waiting.clear()
    return [f"{job.program}: {result}" for result, job, expected in done if not right(result, expected)]


@pytest.mark.timeout(900 + CASES * 0.1)
def test_hostile_and_honest_cases_mixed_leave_nothing_behind() -> None:
    before = own_use()
    with opened("docker", harnesses={"pick": HARNESS}, run=RUN, containers=2, memory_bytes=LIMITS.memory_bytes) as pool:
        wrong = judge(pool, CASES // 4, seed=1)
        warm = own_use(pool)
        wrong += judge(pool, CASES - CASES // 4, seed=2)
        end = own_use(pool)
        assert wrong == []
        assert end.memory - warm.memory < 8 * MIB
        assert end.threads <= warm.threads + 1
        assert end.descriptors <= warm.descriptors + 2
        left = containers()
        assert len(left) == 2
        seen = {pid for container in pool.live for pid in inside(container.id)}
        assert len(seen) == 3 * len(pool.live)  # init, supervisor, nursery: no case is left
    wait_until(lambda: not containers())
    after = own_use()
    assert after.descriptors <= before.descriptors + 1
    assert after.threads <= before.threads + 1
    assert not cases_of(seen), "a case lives on without its container"
    print(f"\n{CASES} cases: {(end.memory - warm.memory) / MIB:+.1f} MiB, {pool.num_started} containers")


@pytest.mark.timeout(900 + CASES * 0.1)
def test_a_supervisor_does_not_grow_with_the_programs_that_it_judges() -> None:
    config = {"containers": 1, "memory_bytes": LIMITS.memory_bytes}
    cheap = [
        (attack, mode)
        for attack in ATTACKS
        if not attack.costly
        for mode, expected in attack.expected.items()
        if not {Outcome.output_limit, Outcome.memory, Outcome.timeout} & set(expected.outcomes) and not stays(attack)
    ]
    draw = random.Random(3)
    with opened("docker", harnesses={"pick": HARNESS}, run=RUN + "-one", **config) as pool:
        pool.jobs_per_container = 1 << 30
        game = Pick()
        uses = []
        started = 0
        for part in range(3):
            for _ in range(max(100, CASES // 16)):
                attack_once(pool, *draw.choice(cheap), game)
            if part == 0:
                started = pool.num_started
            (container,) = pool.live
            uses.append(inside(container.id))
        assert pool.num_started == started, "the container was replaced: choose milder attacks"
    assert [len(use) for use in uses] == [3, 3, 3]  # init, supervisor, nursery
    for pid, first in uses[1].items():
        last = uses[2][pid]
        assert last.memory - first.memory < MIB, f"{first} {last}"
        assert last[1:] == first[1:]


def stays(attack: object) -> bool:
    """Says whether the attack makes the supervisor wait for it, and so costs its container."""
    return attack.name in ("patches-the-way-out", "claims-a-crash-and-goes-on", "leaves-a-del-that-loops")  # type: ignore[attr-defined]


def cases_of(seen: set[int]) -> list[int]:
    """Which of these processes still run."""
    return [pid for pid in seen if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def wait_until(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()
