"""What `flexsink train tiny` costs and achieves: wall time, peak memory, reward, held-out score.

    .venv/bin/python -m tests.bench.train_tiny 0 1 2 --out tests/bench/results/train_tiny.json

trains once for each seed, one after another, and exits 1 when a bar is missed. Memory is the proportional set size
(PSS) of the flow, its stages and the run's sandboxes together, without dockerd and the Prefect server.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from stages.artifacts import RunDir, history

ROOT = Path(__file__).parents[2]
MAX_WALL_S, MAX_PSS_BYTES = 420.0, 4 << 30
MIN_GAIN_SE, MIN_SCORE_RATIO = 3.0, 1.5
EDGE = 3  # iterations at either end whose rewards are compared
SAMPLE_S = 1.0


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run. scores are (mean, low, high): held-out points a game with 95 % bootstrap intervals over programs.

    reward_gain_se: the gain of the mean reward over its standard error, groups as units
    distinct: distinct programs among those evaluated
    """

    seed: int
    wall_s: float
    peak_pss_bytes: int
    reward_first: float
    reward_last: float
    reward_gain_se: float
    untrained_score: tuple[float, float, float]
    trained_score: tuple[float, float, float]
    greedy_score: float
    distinct_untrained: int
    distinct_trained: int

    def missed(self) -> list[str]:
        """Returns the learning bars that this run misses, in words."""
        bars = {
            f"the reward rose by {self.reward_gain_se:.1f} standard errors": self.reward_gain_se > MIN_GAIN_SE,
            f"the score rose {self.score_ratio:.2f} times": self.score_ratio >= MIN_SCORE_RATIO,
            "the intervals overlap": self.trained_score[1] > self.untrained_score[2],
            f"greedy scores {self.greedy_score:.0f}": self.trained_score[0] > self.greedy_score,
            f"{self.peak_pss_bytes >> 20} MiB at the peak": self.peak_pss_bytes < MAX_PSS_BYTES,
        }
        return [words for words, met in bars.items() if not met]

    @property
    def score_ratio(self) -> float:
        return self.trained_score[0] / self.untrained_score[0]


def train(seed: int, path: Path, *words: str) -> tuple[float, int]:
    """Runs the command and returns its wall time in seconds and its peak PSS in bytes; its output goes where ours does.

    Errors: CalledProcessError when it fails.
    """
    command = [sys.executable, "-m", "flows.cli", "train", "tiny", f"train.seed={seed}", "--run-dir", str(path), *words]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    peak = 0
    while process.poll() is None:
        peak = max(peak, pss_of(process.pid, path))
        time.sleep(SAMPLE_S)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.monotonic() - started, peak


def pss_of(pid: int, run: Path) -> int:
    """Returns the PSS in bytes of a process, what it started and the run's sandboxes, but not of a Prefect server."""
    total = 0
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in [*tree, *sandboxes_of(run)]:
        try:
            if not any("prefect.server" in word for word in process.cmdline()):
                total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return total


def sandboxes_of(run: Path) -> list[psutil.Process]:
    """Returns the processes in the containers that bear the run's label."""
    import docker

    if not (run / "environment.json").exists():
        return []
    label = f"flexsink.run={RunDir(run).labels()['flexsink.run']}"
    client = docker.from_env()
    found = []
    try:
        for container in client.api.containers(filters={"label": [label]}):
            rows = client.api.top(container["Id"], "-eo pid")["Processes"] or ()  # none where it has just ended
            found += [psutil.Process(int(row[0])) for row in rows]
    except (docker.errors.DockerException, psutil.NoSuchProcess, OSError):
        pass  # a container that ended between two calls; the next sample is a second away
    finally:
        client.close()
    return found


def read_back(seed: int, path: Path, wall_s: float, peak: int) -> Measured:
    """Returns a finished run's figures, read from its artifacts."""
    run = RunDir(path)
    indices = history.scored(run)
    first, last = ([history.summed_up(run, index) for index in part] for part in (indices[:EDGE], indices[-EDGE:]))

    def mean(part: Sequence[history.Iteration]) -> float:
        return sum(each.reward for each in part) / EDGE

    def error(part: Sequence[history.Iteration]) -> float:
        return math.hypot(*(each.reward_error for each in part)) / EDGE

    evaluated = history.evaluated(run)
    untrained, trained = (only(evaluated[index], "policy") for index in (min(evaluated), max(evaluated)))
    (greedy,) = (row["mean_score"] for row in evaluated[min(evaluated)] if row["name"] == "greedy")
    return Measured(
        seed=seed,
        wall_s=round(wall_s, 1),
        peak_pss_bytes=peak,
        reward_first=mean(first),
        reward_last=mean(last),
        reward_gain_se=(mean(last) - mean(first)) / math.hypot(error(first), error(last)),
        untrained_score=(untrained["mean_score"], untrained["mean_score_low"], untrained["mean_score_high"]),
        trained_score=(trained["mean_score"], trained["mean_score_low"], trained["mean_score_high"]),
        greedy_score=greedy,
        distinct_untrained=untrained["distinct_programs"],
        distinct_trained=trained["distinct_programs"],
    )


def only(rows: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (row,) = (row for row in rows if row["kind"] == kind)
    return row


def record(runs: Sequence[Measured]) -> dict[str, Any]:
    """Returns what the results file holds."""
    import torch

    return {
        "what": "flexsink train tiny: 20 iterations of 6 x 8 completions, held-out games on 64 programs x 4 seeds",
        "command": f"python -m tests.bench.train_tiny {' '.join(str(run.seed) for run in runs)}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "runs": [dataclasses.asdict(run) | {"score_ratio": run.score_ratio, "missed": run.missed()} for run in runs],
    }


def table_row(run: Measured) -> str:
    """Returns the run as a row of the README's table."""
    untrained, trained = (
        f"{mean:.0f} [{low:.0f}, {high:.0f}]" for mean, low, high in (run.untrained_score, run.trained_score)
    )
    return (
        f"| {run.seed} | {run.reward_first:.2f} -> {run.reward_last:.2f} ({run.reward_gain_se:.1f} standard errors) "
        f"| {untrained} -> {trained} | {run.score_ratio:.2f} | {run.distinct_untrained} -> {run.distinct_trained} "
        f"| {run.wall_s / 60:.1f} min, {run.peak_pss_bytes / (1 << 30):.1f} GiB |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.train_tiny", description=__doc__)
    parser.add_argument("seeds", type=int, nargs="+", metavar="SEED")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            path = Path(folder, f"seed-{seed}")
            runs.append(read_back(seed, path, *train(seed, path)))
            print(table_row(runs[-1]), *runs[-1].missed(), sep="\n", flush=True)
    if options.out:
        options.out.write_text(json.dumps(record(runs), indent=2) + "\n")
    slow = [run.seed for run in runs if run.wall_s > MAX_WALL_S]
    return int(bool(slow) or any(run.missed() for run in runs))


if __name__ == "__main__":
    sys.exit(main())
