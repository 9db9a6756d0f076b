"""Learning shown on a GPU: a mid-size gpt-oss is warm-started, then trained by GRPO on 4x4 2048. No Prefect, no Docker.

    python -m tests.bench.learn_on_gpu --out data/runs/learn --minutes 9

Three phases, each done once: the local sandbox is attacked with the whole corpus while `stages.tiny --size mid` makes
the model on the GPU; the run's own stages and loop train it; what came of it is recorded small: a summary
learn-<gpu>-<date>.json, report.html and tables without tokens. All state lies in --out, so a further call goes on where
the last one stopped. When the minutes end before the iterations do, the run is closed where it is: evaluated, recorded.

The run is not exported here: `flexsink export` does that at any time.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flows import steps
from flows.config import overridden, resolved
from flows.progress import Lines
from flows.train import go_on, working
from stages.artifacts import RunDir, StageId, history
from stages.artifacts.parquet import EVALUATIONS, METRICS, read_table
from stages.bench.results import rounded, today, write
from stages.config import (
    EvaluateConfig,
    ExportConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    SandboxConfig,
    TrainConfig,
    UpdateConfig,
    replace,
)
from stages.report import write_report
from stages.sandbox import open_pool
from stages.sandbox.corpus import load
from stages.sandbox.local import find_walls
from stages.sandbox.self_check import LIMITS, Pick, attack_pool
from stages.tasks.arenas import task_arenas

ROOT = Path(__file__).parents[2]
EVALUATION_S = 25.0  # kept back for the last evaluation until one has been timed
RECORD_S = 15.0
EDGE = 5  # iterations at either end whose rewards are compared
PACKAGES = ("torch", "triton", "transformers", "pyarrow")

Step = Callable[[StageId], object]


class OutOfTime(Exception):
    """The next iteration would end too late."""


def configuration(model: Path, *, iterations: int, words: Sequence[str] = ()) -> RunConfig:
    """Returns the run's configuration; words are section.key=value."""
    config = RunConfig(
        train=TrainConfig(iterations=iterations),
        model=ModelConfig(source=str(model), experts="mxfp4", dtype="bfloat16"),
        rollout=RolloutConfig(prompts=16, group_size=8, max_new_tokens=256, max_slots=128),
        # As the preset tiny (see there), for five times as many steps of five times as many completions: an entry of
        # an adapter moves as far in all, at twice its rank.
        update=UpdateConfig(
            learning_rate=1.5e-3,
            warmup_steps=4,
            schedule_steps=240,
            steps=2,
            pack_tokens=16_384,
            kl=0.02,
            max_grad_norm=0.02,
            lora_rank=16,
            lora_alpha=32.0,
        ),
        evaluate=EvaluateConfig(every=50, programs=128, games=4),
        sandbox=SandboxConfig(backend="local", containers=max(2, (os.cpu_count() or 2) - 2), cpu_s=2.0),
        export=ExportConfig(format="adapter"),
    )
    return resolved(overridden(config, words))


def attack() -> dict[str, Any]:
    """Attacks the local sandbox with the whole corpus; what came of it. UserError where there is no such sandbox."""
    started = time.monotonic()
    attacks, arenas = load(), {"pick": Pick(), **task_arenas()}
    config = SandboxConfig(backend="local", containers=1, memory_bytes=LIMITS.memory_bytes)
    harnesses = {name: arena.harness for name, arena in arenas.items()}
    with open_pool(config, harnesses=harnesses, labels={"flexsink.stage": "self-check"}) as pool:
        found = list(attack_pool(pool, attacks, arenas=arenas, backend="local"))
    failed = [f"{each.attack.name}, {each.mode}: {each.failure}" for each in found if not each.passed]
    return {
        "walls": str(find_walls()),
        "attacks": len(attacks),
        "runs": len(found),
        "skipped": sum(bool(each.skipped) for each in found),
        "failed": failed,
        "seconds": round(time.monotonic() - started, 1),
    }


def prepare(out: Path, warm_start: Sequence[str]) -> None:
    """Leaves out/model and out/self-check.json, made at the same time; SystemExit when either fails.

    warm_start: the arguments of stages.tiny but for --out.
    """
    model, checked, log = out / "model", out / "self-check.json", out / "warm-start.log"
    making, unfinished, started = None, out / ".model", time.monotonic()
    if not model.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [sys.executable, "-u", "-m", "stages.tiny", "--out", str(unfinished), *warm_start]
        with log.open("w") as file:
            making = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        if not checked.exists():
            result = attack()
            print("self-check", json.dumps(result), flush=True)
            if result["failed"]:
                raise SystemExit("the local sandbox did not survive its self-check on this machine")
            write(checked, result)
        if making is not None:
            status = making.wait()
            print(log.read_text(), flush=True)
            if status:
                raise SystemExit(f"the warm start ended with {status}")
            seconds = round(time.monotonic() - started, 1)
            last = [line for line in log.read_text().splitlines() if line.startswith("step")][-1]
            write(out / "warm-start.json", {"command": shlex.join(command[3:]), "seconds": seconds, "last": last})
            unfinished.rename(model)
            print(f"warm start: {seconds} s", flush=True)
    finally:
        if making is not None and making.poll() is None:
            making.kill()
            making.wait()


def train(run: RunDir, config: RunConfig, *, deadline: float) -> int:
    """Runs every stage but the export until the deadline (of time.monotonic); the iterations that are done.

    What the deadline leaves is a run of fewer iterations, evaluated at its end; a further call makes it longer.
    """
    reserve_s = EVALUATION_S

    def timed(*work: Any) -> Step:
        inner = steps.local(*work)

        def step(stage: StageId) -> None:
            nonlocal reserve_s
            done = run.manifest(stage) is not None
            if stage.name == "export":
                return
            if stage.name == "rollout" and not done and time.monotonic() + reserve_s > deadline:
                raise OutOfTime
            started = time.monotonic()
            inner(stage)
            if stage.name == "evaluate" and not done:
                reserve_s = 1.2 * (time.monotonic() - started)

        return step

    with Lines() as view, working(run, config, view) as work:
        try:
            go_on(run, config, work, timed)
        except OutOfTime:
            done = len(updated(run))
            print(f"out of time after {done} iterations", flush=True)
            if done:
                go_on(run, replace(config, "train", iterations=done), work, timed)
    return len(updated(run))


def updated(run: RunDir) -> list[int]:
    """The iterations whose update is done."""
    return sorted(stage.index or 0 for stage in history.finished(run) if stage.name == "update")


def summed_up(run: RunDir) -> dict[str, Any]:
    """Returns a run in figures: held-out scores with their intervals, rewards by iteration, seconds by stage."""
    evaluated = history.evaluated(run)
    scored = [history.summed_up(run, index) for index in history.scored(run)]
    seconds: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    for stage, rows in history.timings(run):
        for row in rows:
            if row["what"] == "stage":
                seconds.setdefault(stage.name, []).append(row["seconds"])
            elif row["tokens_per_s"]:
                rates.setdefault(f"{stage.name} {row['what']}", []).append(row["tokens_per_s"])

    def row_of(row: dict[str, Any]) -> dict[str, Any]:
        names = ("programs", "distinct_programs", "games")
        body = {name: row[name] for name in names}
        for figure in ("mean_score", "win_rate"):
            body[figure] = [row[figure], row[f"{figure}_low"], row[f"{figure}_high"]]
        return body

    def only(rows: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
        return {row["name"]: row_of(row) for row in rows if row["kind"] == kind}

    held_out = {updates: next(iter(only(rows, "policy").values())) for updates, rows in sorted(evaluated.items())}
    before, after = held_out[min(held_out)], held_out[max(held_out)]
    rewards = [each.reward for each in scored]
    engine_kl = [each.metrics["engine_kl"] for each in scored if "engine_kl" in each.metrics]
    return {
        "iterations": len(updated(run)),
        "held_out": {str(updates): body for updates, body in held_out.items()},
        "baselines": only(evaluated[min(evaluated)], "baseline"),
        "score_ratio": after["mean_score"][0] / max(before["mean_score"][0], 1e-9),
        "learned": after["mean_score"][1] > before["mean_score"][2],
        "reward_first_last": [statistics.mean(rewards[:EDGE]), statistics.mean(rewards[-EDGE:])] if rewards else [],
        "rewards": rewards,
        "reward_errors": [each.reward_error for each in scored],
        "tokens": [each.tokens for each in scored],
        "entropy": [each.metrics.get("entropy") for each in scored],
        "engine_kl_mean_max": [statistics.mean(engine_kl), max(engine_kl)] if engine_kl else [],
        "outcomes_first": dict(sum((Counter(each.outcomes) for each in scored[:EDGE]), Counter())),
        "outcomes_last": dict(sum((Counter(each.outcomes) for each in scored[-EDGE:]), Counter())),
        "stage_s_median": {name: statistics.median(values) for name, values in seconds.items()},
        "stage_s_total": {name: sum(values) for name, values in seconds.items()},
        "tokens_per_s_median": {name: statistics.median(values) for name, values in rates.items()},
    }


def tables(run: RunDir, folder: Path) -> None:
    """Writes the run's tables without tokens and moves: metrics, scores, evaluations."""
    metrics = [read_table(run.folder(StageId("update", index)), "metrics", METRICS) for index in updated(run)]
    scores = []
    for index in history.scored(run):
        table = history.figures(run, index)
        scores.append(table.add_column(0, "iteration", pa.array([index] * len(table), pa.int32())))
    games = []
    for updates in sorted(history.evaluated(run)):
        names = ("kind", "name", "completion_id", "outcome", "mean_score", "win_rate", "program")
        held = read_table(run.folder(StageId("evaluate", updates)), "evaluations", EVALUATIONS)
        held = held.select([name for name in names if name in held.column_names])
        games.append(held.add_column(0, "updates", pa.array([updates] * len(held), pa.int32())))
    for name, parts in (("metrics", metrics), ("scores", scores), ("evaluations", games)):
        if parts:
            whole = pa.concat_tables([part.replace_schema_metadata(None) for part in parts], promote_options="default")
            pq.write_table(whole, folder / f"{name}.parquet", compression="zstd", compression_level=19)


def record(run: RunDir, out: Path, folder: Path, *, gpu: str, command: str) -> dict[str, Any]:
    """Writes the JSON, the report and the tables into the folder; the JSON's body."""
    folder.mkdir(parents=True, exist_ok=True)
    card = gpu.split()[-1].lower() if gpu else "cpu"
    model = json.loads((run.folder(StageId("load")) / "model.json").read_text())
    body = {
        "bench": "learn",
        "gpu": gpu,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES if installed(name)},
        "command": command,
        "date": today(),
        "model": {name: model.get(name) for name in ("architecture", "held_as", "weight_bytes", "adapter")},
        "warm_start": read_json(out / "warm-start.json"),
        "self_check": read_json(out / "self-check.json"),
        "phases": read_json(out / "phases.json"),
        "config": run.config().flat(),
        **summed_up(run),
    }
    write(folder / f"learn-{card}-{today()}.json", body)
    tables(run, folder)
    write_report(run.path, out=folder / "report.html")
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:>10,} bytes  {path}")
    return body


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def words_of(body: dict[str, Any]) -> list[str]:
    """What is printed at the end."""
    lines = []
    for updates, row in body["held_out"].items():
        (score, *scores), (rate, *rates) = row["mean_score"], row["win_rate"]
        lines.append(
            f"held out after {updates:>3} updates: score {score:.0f} [{scores[0]:.0f}, {scores[1]:.0f}], won "
            f"{rate:.1%} [{rates[0]:.1%}, {rates[1]:.1%}], {row['distinct_programs']} of {row['programs']} distinct"
        )
    lines.append(f"ratio {body['score_ratio']:.2f}, learned: {body['learned']}")
    lines.append(f"reward, first and last {EDGE}: {[round(each, 3) for each in body['reward_first_last']]}")
    lines.append(f"median seconds: { {name: round(each, 2) for name, each in body['stage_s_median'].items()} }")
    lines.append(f"engine against trainer, k3 KL mean and max: {rounded(body['engine_kl_mean_max'])}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.learn_on_gpu", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="section.key=value", help="of the run's configuration")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="everything that a further call needs")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call, all phases together (9)")
    parser.add_argument("--iterations", type=int, default=100, metavar="N", help="of training (100)")
    parser.add_argument("--record", type=Path, metavar="DIR", help="where what is recorded goes (OUT/record)")
    parser.add_argument(
        "--warm-start",
        default="--size mid --device cuda --seconds 130",
        metavar="WORDS",
        help="arguments of stages.tiny (%(default)s)",
    )
    parser.add_argument("--only-prepare", action="store_true", help="stop when the model is made")
    options = parser.parse_args()
    started = time.monotonic()
    deadline = started + 60 * options.minutes - RECORD_S
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    prepare(out, shlex.split(options.warm_start))
    prepared = time.monotonic()
    print(f"prepared after {prepared - started:.0f} s", flush=True)
    if options.only_prepare:
        return 0
    config = configuration(out / "model", iterations=options.iterations, words=options.words)
    path = out / "run"
    run = RunDir.open(path) if (path / "config.json").exists() else RunDir.create(path, config)
    before = len(updated(run))
    done = train(run, config, deadline=deadline)
    phase = {"prepare_s": prepared - started, "train_s": time.monotonic() - prepared, "iterations": [before, done]}
    write(out / "phases.json", [*(read_json(out / "phases.json") or []), phase])
    print(f"trained for {phase['train_s']:.0f} s", flush=True)
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    command = f"python -m tests.bench.learn_on_gpu {shlex.join(sys.argv[1:])}"
    body = record(run, out, options.record or out / "record", gpu=gpu, command=command)
    print("\n".join(words_of(body)))
    print(f"all of it: {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
