"""How fast programs are judged, and whose CPU time it takes: `flexsink bench score`.

On real sandboxes, one after another:
    cold      a container from nothing to the verdict on its first program
    single    trivial programs one at a time, from submit to verdict
    flood     many trivial programs at once: cases a second, and what a case costs beside its program
    stage     the score stage over completions that hold the greedy strategy: whose CPU time it was

A case is one program's process; a trivial one ends its game with its first answer. In `stage` two shares are told: that
of the programs' processes and the rules, and, stricter, that of the calls of strategy() and of Game.play() alone, both
timed in place on a few further completions. The rest is forks, filters, compiling, frames and pipes, the harness, the
pool's threads, the tables written, the daemon. No torch is imported.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from stages import score
from stages.artifacts import RunDir, Session, StageContext, StageId, execute
from stages.artifacts.parquet import ROLLOUTS, write_parts
from stages.bench.accounts import Reading, read
from stages.config import RunConfig
from stages.sandbox import Job, Result, SandboxPool, open_pool
from stages.tasks import judging, registry
from stages.tasks.base import Task
from stages.tasks.game2048.baselines import GREEDY

LABELS = {"flexsink.run": "bench-score"}
TRIVIAL = "def strategy(board):\n    return 'no letter'\n"
TIMED_COMPLETIONS = 8  # whose strategy and rules are timed; with 100 games each they take 3 s of CPU
GROUP_SIZE = 8

# Laid over the task's own harness: what the strategy's calls of a round and the rules of a round take. The clock is
# the thread's: under RLIMIT_CPU the process's moves at ticks and when the process sleeps (posix-cpu-timers.c of Linux).
TIMED = """

import struct
import time

SPENT = b"spent"
_judge, _play, _serve, _ask_all = judge, play, serve, ask_all
rules_s = strategy_s = 0.0


def play(games, letters):
    global rules_s
    started = time.thread_time()
    _play(games, letters)
    rules_s += time.thread_time() - started


def judge(cases, ask):
    global rules_s
    rules_s = 0.0
    rows = _judge(cases, ask)
    (strategy_s,) = struct.unpack("<d", ask(SPENT))
    return [{"strategy_s": strategy_s, "rules_s": rules_s, "moves": sum(row["moves"] for row in rows)}]


def ask_all(function, boards):
    global strategy_s
    started = time.thread_time()
    letters = _ask_all(function, boards)
    strategy_s += time.thread_time() - started
    return letters


def serve(function, receive, send):
    def received():
        while (question := receive()) == SPENT:
            send(struct.pack("<d", strategy_s))
        return question

    _serve(function, received, send)
"""


class Bars(NamedTuple):
    """What is asked of 2 cores that do nothing else."""

    cases_per_s: float = 300.0
    cold_ms: float = 400.0
    programs_and_rules: float = 0.8
    rules_us_per_move: float = 5.0


class Watched:
    """A pool that remembers the futures of its jobs."""

    def __init__(self, pool: SandboxPool) -> None:
        self.pool, self.config = pool, pool.config
        self.futures: list[Future[Result]] = []

    @property
    def num_waiting(self) -> int:
        return self.pool.num_waiting

    def submit(self, job: Job) -> "Future[Result]":
        self.futures.append(future := self.pool.submit(job))
        return future


def measure(
    config: RunConfig,
    *,
    completions: int = 64,
    games: int = 100,
    cases: int = 600,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Returns all figures, by measurement; times in ms or us as their names say. UserError without a sandbox."""
    task = registry.get("game2048", {"games": games})
    source = task.harness_source()
    harnesses = {task.name: source, "timed": source + TIMED}
    note("cold containers")
    figures: dict[str, Any] = {"cold": cold(config, harnesses, task)}
    with open_pool(config.sandbox, harnesses=harnesses, labels=LABELS) as pool:
        note("trivial programs, one at a time")
        figures["single"] = single(pool, task, config, cases=cases // 3)
        note("trivial programs, all at once")
        figures["flood"] = flood(pool, task, config, cases=cases)
    with open_pool(config.sandbox, harnesses=harnesses, labels=LABELS) as pool:  # whose accounts start from nothing
        note(f"the score stage, {completions} completions of {games} games")
        figures["stage"] = stage(pool, task, config, completions=completions, games=games)
    return figures


def trivial(task: Task, config: RunConfig, number: int) -> Job:
    return task.job(f"trivial-{number}", TRIVIAL, (number,), judging.limits_of(config.sandbox))


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Returns p50_ms and p99_ms, the sample that so many do not exceed."""
    ordered = sorted(seconds)
    return {f"p{share}_ms": 1e3 * ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 99)}


def cold(config: RunConfig, harnesses: Mapping[str, str], task: Task, *, times: int = 5) -> dict[str, float]:
    seconds = []
    for number in range(times):
        started = time.perf_counter()
        one = dataclasses.replace(config.sandbox, containers=1)
        with open_pool(one, harnesses=harnesses, labels=LABELS) as pool:
            pool.submit(trivial(task, config, number)).result()
            seconds.append(time.perf_counter() - started)
    return {"median_ms": 1e3 * statistics.median(seconds), "slowest_ms": 1e3 * max(seconds), "containers": times}


def single(pool: SandboxPool, task: Task, config: RunConfig, *, cases: int) -> dict[str, float]:
    warm(pool, task, config)
    seconds = []
    for number in range(cases):
        started = time.perf_counter()
        pool.submit(trivial(task, config, number)).result()
        seconds.append(time.perf_counter() - started)
    return {**quantiles(seconds), "cases": cases}


def flood(pool: SandboxPool, task: Task, config: RunConfig, *, cases: int) -> dict[str, float]:
    warm(pool, task, config)
    before, replaced, started = read(pool), pool.num_started, time.perf_counter()
    futures = [pool.submit(trivial(task, config, number)) for number in range(cases)]
    results = [future.result() for future in futures]
    seconds = time.perf_counter() - started
    used = read(pool).since(before)
    figures = {"cases_per_s": cases / seconds, **quantiles([result.wall_s for result in results]), "cases": cases}
    if pool.num_started == replaced:  # else some of the containers' accounts are gone
        figures |= {f"{name}_ms": 1e3 * value / cases for name, value in shares(used, results).items()}
        figures["overhead_ms"] = 1e3 * sum(used) / cases
    return figures


def warm(pool: SandboxPool, task: Task, config: RunConfig) -> None:
    """Returns when every container has judged something."""
    jobs = [trivial(task, config, number) for number in range(8 * pool.config.containers)]
    for future in [pool.submit(job) for job in jobs]:
        future.result()


def shares(used: Reading, results: Sequence[Result]) -> dict[str, float]:
    """Returns the CPU seconds of each part; their sum is that of the reading."""
    programs = sum(result.cpu_s for result in results)
    supervisors = sum(result.supervisor_cpu_s for result in results)
    return {
        "program": programs,
        "supervisor": supervisors,
        "nursery_and_init": used.sandboxes - programs - supervisors,
        "pool_and_stage": used.process,
        "daemon": used.daemons,
    }


def stage(pool: SandboxPool, task: Task, config: RunConfig, *, completions: int, games: int) -> dict[str, Any]:
    """Returns the CPU accounts of a score stage over greedy strategies, no two of them the same text."""
    warm(pool, task, config)
    watched = Watched(pool)
    config = dataclasses.replace(
        config, task=dataclasses.replace(config.task, name=task.name, options=(("games", games),))
    )
    with tempfile.TemporaryDirectory(prefix="flexsink-bench-") as folder:
        run = recorded_rollout(Path(folder, "run"), config, completions=completions)
        session = Session()
        session.get("sandbox", lambda: watched)
        before, started = read(pool), time.perf_counter()
        execute(run, config, StageId("score", 0), score.run, session)
        seconds = time.perf_counter() - started
        used = read(pool).since(before)
    results = [future.result() for future in watched.futures]
    moves = sum(game["moves"] for result in results for game in result.cases)
    accounts = shares(used, results)

    limits = judging.limits_of(config.sandbox)
    timed = []
    for number in range(TIMED_COMPLETIONS):
        job = task.job(f"timed-{number}", GREEDY, range(number * games, (number + 1) * games), limits)
        timed.append(pool.submit(dataclasses.replace(job, harness="timed")))
    rows = [row for future in timed for row in future.result().cases]
    timed_moves = sum(row["moves"] for row in rows)
    strategy, rules = (sum(row[name] for row in rows) / timed_moves for name in ("strategy_s", "rules_s"))
    # Rates of other games, measured afterwards: never more than the account that they are part of.
    in_rules = min(rules * moves, accounts["supervisor"])
    in_calls = min(strategy * moves, accounts["program"])
    total = sum(used)
    return {
        "completions": completions,
        "games": games,
        "moves": moves,
        "wall_s": seconds,
        "cpu_s": total,
        "moves_per_s": moves / seconds,
        "strategy_us_per_move": 1e6 * strategy,
        "rules_us_per_move": 1e6 * rules,
        "share_programs_and_rules": (accounts["program"] + in_rules) / total,
        "share_calls_and_rules": (in_calls + in_rules) / total,
        "share": {name: value / total for name, value in accounts.items()},
    }


def recorded_rollout(path: Path, config: RunConfig, *, completions: int) -> RunDir:
    """Returns a run whose rollout 0 holds so many completions, each with the greedy strategy."""
    run = RunDir.create(path, config)
    rows = [
        {
            "completion_id": f"00000-{number // GROUP_SIZE:03d}-{number % GROUP_SIZE:03d}",
            "prompt_id": f"00000-{number // GROUP_SIZE:03d}",
            "group_index": number // GROUP_SIZE,
            "sample_index": number % GROUP_SIZE,
            "iteration": 0,
            "policy_version": 0,
            "task": config.task.name,
            "prompt": "",
            "completion": f"<|channel|>final<|message|>```python\n{GREEDY}# {number}\n```<|return|>",
            "prompt_ids": [0],
            "completion_ids": [0],
            "engine_logprobs": [0.0],
            "finish_reason": "stop",
            "seed": 0,
            "num_tokens": 1,
        }
        for number in range(completions)
    ]

    def load(context: StageContext) -> None:
        (context.out / "model.json").write_text("{}")

    def rollout(context: StageContext) -> None:
        write_parts(context.out, "rollouts", rows, ROLLOUTS)

    with Session() as session:
        execute(run, config, StageId("load"), load, session)
        execute(run, config, StageId("rollout", 0), rollout, session)
    return run
