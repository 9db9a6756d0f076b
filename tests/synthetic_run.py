"""A run directory as a training run would leave it, written in seconds by the stages' own writers, without any model.

Rewards, verdicts and games are real: the task scores them, and its rules play the project's own baseline programs
(trusted texts, so they run here). Which program a completion holds is drawn: early ones are mostly broken or weak,
later ones mostly look ahead. Numbers that only a model can give (logprobs, loss, entropy) are made up.

By hand: python -m tests.synthetic_run data/runs/synthetic --iterations 24
"""

import argparse
import functools
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.artifacts import RunDir, Session, StageContext, StageId, execute
from stages.artifacts.parquet import (
    METRICS,
    ROLLOUTS,
    SAMPLES,
    read_table,
    write_parts,
    write_table,
)
from stages.config import EvaluateConfig, ExportConfig, RolloutConfig, RunConfig, TrainConfig, UpdateConfig
from stages.sandbox.protocol import Outcome, Result
from stages.tasks import programs, registry, tables
from stages.tasks.game2048.baselines import BASELINES
from stages.tasks.game2048.rules import Game

BROKEN = {
    "syntax_error": ("def strategy(board):\n    best = max(board\n    return 'W'\n", "'(' was never closed (line 2)"),
    "cheat": (
        "def strategy(board):\n    board[0][0] = 2048\n    open('/proc/self/mem')\n    return 'W'\n",
        "a system call that the filter forbids: openat",
    ),
    "foreign_import": ("import os\n\ndef strategy(board):\n    return os.environ['MOVE']\n", "imports os"),
    "timeout": ("def strategy(board):\n    while True:\n        pass\n", "10 s of CPU are used up"),
    "crash": ("def strategy(board):\n    return 'WASD'[len(board)]\n", "IndexError: string index out of range"),
}
FAMILIES = ("random", "fixed_order", "greedy", "look_ahead")
POOL = 12  # different games of each family; completions share them, as only their spread matters here


def config_of(*, iterations: int, prompts: int, group_size: int, programs: int = 16, every: int = 0) -> RunConfig:
    """The configuration of a synthetic run."""
    return RunConfig(
        preset="tiny",
        train=TrainConfig(iterations=iterations),
        update=UpdateConfig(kl=0.01),
        rollout=RolloutConfig(prompts=prompts, group_size=group_size),
        evaluate=EvaluateConfig(every=every, programs=programs, games=4),
        export=ExportConfig(format="mxfp4"),
    )


def write(
    path: Path, config: RunConfig, *, upto: StageId | None = None, **instead: Callable[[StageContext], None]
) -> RunDir:
    """Write the run into `path` stage by stage, as the flow would; stop after the stage `upto`.

    `instead` are stages of your own by name: write(path, config, score=my_score).
    """
    run = RunDir.create(path, config)
    with Session() as session:
        for stage in stages_of(config):
            execute(run, config, stage, {**STAGES, **instead}[stage.name], session)
            if stage == upto:
                break
    return run


def stages_of(config: RunConfig) -> list[StageId]:
    """The stages of a run in the order in which the flow runs them."""
    stages = [StageId("load"), StageId("evaluate", 0)]
    last = config.train.iterations
    for i in range(last):
        stages += [StageId("rollout", i), StageId("score", i), StageId("update", i)]
        if config.evaluate.every and (i + 1) % config.evaluate.every == 0 and i + 1 < last:
            stages.append(StageId("evaluate", i + 1))
    return [*stages, StageId("evaluate", last), StageId("export", last, config.export.format)]


def load(context: StageContext) -> None:
    (context.out / "model.json").write_text('{"architecture": "GptOssForCausalLM"}\n')
    context.timings.append({"what": "read checkpoint", "seconds": 1e-4, "peak_bytes": 140 << 20})


def rollout(context: StageContext) -> None:
    config, i, began = context.config, context.stage.index or 0, time.perf_counter()
    prompt = registry.get(config.task.name, config.task.option_values()).prompt()
    rows = []
    for group in range(config.rollout.prompts):
        for sample in range(config.rollout.group_size):
            draw = random.Random(f"{i}-{group}-{sample}")
            text = completion(draw, progress(context))
            tokens = max(20, round(len(text) / 3.4))
            rows.append(
                {
                    "completion_id": f"{i:05d}-{group:03d}-{sample:03d}",
                    "prompt_id": f"{i:05d}-{group:03d}",
                    "group_index": group,
                    "sample_index": sample,
                    "iteration": i,
                    "policy_version": i,
                    "task": config.task.name,
                    "prompt": prompt,
                    "completion": text,
                    "prompt_ids": list(range(100)),
                    "completion_ids": list(range(tokens)),
                    "engine_logprobs": noise()[:tokens],
                    "finish_reason": "stop" if text.endswith("<|return|>") else "length",
                    "seed": draw.getrandbits(62),
                    "num_tokens": tokens,
                }
            )
    write_parts(context.out, "rollouts", rows, ROLLOUTS)
    total = sum(row["num_tokens"] for row in rows)
    seconds = time.perf_counter() - began
    timing = {"seconds": seconds, "num_tokens": total, "tokens_per_s": total / seconds, "peak_bytes": 700 << 20}
    context.timings += [{"what": "decode", **timing}, {"what": "prefill", "seconds": 0.01 * seconds}]


def score(context: StageContext) -> None:
    task = registry.get(context.config.task.name, context.config.task.option_values())
    rows = read_table(context.input(StageId("rollout", context.stage.index)), "rollouts", ROLLOUTS).to_pylist()
    judged = []
    for row in rows:
        verdict, program = judge(task, row["completion"], random.Random(row["seed"]))
        judged.append(
            {
                "completion_id": row["completion_id"],
                "outcome": str(verdict.outcome),
                "reward": verdict.reward,
                **{f"reward_{name}": value for name, value in verdict.rewards.items()},
                "program": program,
                "games": list(verdict.cases),
                "detail": verdict.detail,
            }
        )
    write_parts(context.out, "scores", judged, tables.scores(task))
    context.timings.append({"what": "sandbox", "seconds": 1e-4 * len(rows), "peak_bytes": 90 << 20})


def update(context: StageContext) -> None:
    i, draw, done = context.stage.index or 0, random.Random(context.stage.index), progress(context)
    scores = read_table(context.input(StageId("score", i)), "scores", columns=["completion_id", "reward"]).to_pylist()
    (context.out / "adapter.safetensors").write_bytes(bytes([i % 256]) * 64)
    write_parts(
        context.out,
        "samples",
        [
            {"completion_id": row["completion_id"], "advantage": 0.0, "loss_mask": [True], "policy_logprobs": [-0.1]}
            for row in scores
        ],
        SAMPLES,
    )
    metrics = [
        {
            "iteration": i,
            "step": 2 * i + step,
            "learning_rate": 5e-5,
            "loss": draw.gauss(0, 0.01),
            "kl": 0.03 * done + 0.004 * draw.random(),
            "clip_fraction": 0.02 + 0.05 * draw.random() * step,
            "ratio_mean": 1.0,
            "engine_kl": 2e-6 * (1 + draw.random()),
            "entropy": 0.9 - 0.4 * done + draw.gauss(0, 0.02),
            "grad_norm": 0.6 + 0.4 * draw.random(),
            "zero_signal_groups": 0,
            "tokens": 5000,
        }
        for step in range(2)
    ]
    write_parts(context.out, "metrics", metrics, METRICS)
    context.timings += [
        {"what": "forward and backward", "seconds": 3e-3, "num_tokens": 9000, "peak_bytes": 900 << 20},
        {"what": "optimizer", "seconds": 2e-4},
    ]


def evaluate(context: StageContext) -> None:
    config = context.config
    task = registry.get(config.task.name, config.task.option_values())
    rows = []
    for n in range(config.evaluate.programs):
        draw = random.Random(f"{context.stage.index}-{n}")
        text = completion(draw, progress(context))
        verdict, program = judge(task, text, draw)
        rows.append(evaluation("policy", "policy", f"e{context.stage.index:05d}-{n:04d}", text, program, verdict))
    for name in FAMILIES:
        for n in range(4):
            result = ended("ok", pool(name)[n::4])
            rows.append(evaluation("baseline", name, None, None, BASELINES[name], task.score(result)))
    write_parts(context.out, "evaluations", rows, tables.evaluations(task))
    names = dict.fromkeys((row["kind"], row["name"]) for row in rows)
    sums = [summary(kind, name, [row for row in rows if row["name"] == name]) for kind, name in names]
    write_table(context.out / "summary.parquet", sums, tables.summary(task))
    context.timings += [{"what": "decode", "seconds": 2e-2, "num_tokens": 11000}, {"what": "games", "seconds": 1e-2}]


def export(context: StageContext) -> None:
    (context.out / "model.safetensors").write_bytes(bytes(2 << 20))
    facts = {"kl_to_live": 0.0125, "score_exported": 3210.0, "gain_kept": 0.42, "gain_kept_with_residual": 0.97}
    (context.out / "export.json").write_text(json.dumps(facts))


STAGES: dict[str, Callable[[StageContext], None]] = {
    "load": load,
    "rollout": rollout,
    "score": score,
    "update": update,
    "evaluate": evaluate,
    "export": export,
}


def progress(context: StageContext) -> float:
    """How far the policy of this stage has come, 0 to 1."""
    return (context.stage.index or 0) / max(context.config.train.iterations, 1)


def completion(draw: random.Random, done: float) -> str:
    """What a policy that has come so far answers."""
    thought = "<|channel|>analysis<|message|>Merge early, keep the large tiles together.<|end|><|start|>assistant"
    if draw.random() < 0.04 * (1 - done):
        return thought.removesuffix("<|start|>assistant")[: draw.randrange(40, 60)]
    if draw.random() < 0.45 - 0.35 * done:
        program = BROKEN[draw.choice([*BROKEN])][0]
    else:
        weights = [4 - 3 * done, 3 - 2 * done, 2.0, 0.4 + 5 * done]
        name = draw.choices(FAMILIES, weights)[0]
        # A comment of its own makes one of a few texts of the same program, as samples of a policy repeat themselves.
        program = BASELINES[name].replace(
            "def strategy(board):", f"def strategy(board):\n    # idea {draw.randrange(6)}"
        )
    return f"{thought}<|channel|>final<|message|>```python\n{program}```<|return|>"


def judge(task: Any, text: str, draw: random.Random) -> tuple[Any, str | None]:
    """The task's verdict on a completion, as if the sandbox had judged its program, and the program."""
    program = task.extract(text)
    if program is None:
        return task.score(None), None
    for outcome, (broken, detail) in BROKEN.items():
        if program == broken:
            state = "timeout" if outcome == "timeout" else "illegal"
            games = [] if outcome == "syntax_error" else [{**opening(4 * n + 2), "state": state} for n in range(4)]
            return task.score(ended(outcome, games, detail)), program
    family = next(name for name in FAMILIES if BASELINES[name][-80:] == program[-80:])
    games = draw.sample(pool(family), 4)
    return task.score(ended("ok", games)), program


def ended(outcome: str, games: list[dict[str, Any]], detail: str = "") -> Result:
    """What a sandbox would have said."""
    return Result(job_id="", outcome=Outcome(outcome), detail=detail, cases=tuple(games), cpu_s=0.0, wall_s=0.0)


@functools.cache
def noise() -> list[float]:
    """Logprobs of as many tokens as a completion can have."""
    draw = random.Random(0)
    return [-abs(draw.gauss(0, 0.5)) for _ in range(2000)]


@functools.cache
def pool(family: str) -> list[dict[str, Any]]:
    """Real games of one family of programs."""
    return [played(family, seed) for seed in range(1, 2 * POOL, 2)]


def played(family: str, seed: int) -> dict[str, Any]:
    """A game to its end; `family` names one of the project's baselines, whose text runs in this process."""
    scope: dict[str, Any] = {}
    exec(BASELINES[family], scope)
    if "random" in scope:
        scope["random"] = random.Random(seed)
    game = Game(seed, size=4, target=2048, max_moves=5000)
    while not game.state:
        tiles = [1 << exponent if exponent else 0 for exponent in game.board]
        game.play(ord(scope["strategy"]([tiles[row : row + 4] for row in range(0, 16, 4)])))
    return game.record()


@functools.cache
def opening(seed: int) -> dict[str, Any]:
    """A game in which nothing was moved."""
    return Game(seed, size=4, target=2048, max_moves=5000).record()


def evaluation(
    kind: str, name: str, completion_id: str | None, text: str | None, program: str | None, verdict: Any
) -> dict[str, Any]:
    """A row of an evaluation."""
    games = list(verdict.cases)
    return {
        "kind": kind,
        "name": name,
        "completion_id": completion_id,
        "completion": text,
        "program": program,
        "outcome": str(verdict.outcome),
        "syntax_tree": programs.syntax_tree(program) if program else None,
        "mean_score": sum(game["score"] for game in games) / max(len(games), 1),
        "win_rate": sum(game["state"] == "won" for game in games) / max(len(games), 1),
        "games": games,
    }


def summary(kind: str, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the summary; the intervals are those of a normal distribution."""
    games = [game for row in rows for game in row["games"]]
    tiles: dict[int, int] = {}
    for game in games:
        tiles[game["max_tile"]] = tiles.get(game["max_tile"], 0) + 1
    body: dict[str, Any] = {
        "kind": kind,
        "name": name,
        "programs": len(rows),
        "distinct_programs": len({row["syntax_tree"] for row in rows}),
        "games": len(games),
        "tiles": [{"tile": tile, "games": tiles[tile]} for tile in sorted(tiles)],
    }
    for column in ("mean_score", "win_rate"):
        values = [row[column] for row in rows]
        mean = sum(values) / len(values)
        error = math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1) / len(values))
        body |= {column: mean, f"{column}_low": max(0.0, mean - 1.96 * error), f"{column}_high": mean + 1.96 * error}
    return body


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    for option, value in (("iterations", 24), ("prompts", 4), ("group-size", 8), ("programs", 64), ("every", 8)):
        parser.add_argument(f"--{option}", type=int, default=value)
    given = vars(parser.parse_args())
    write(given.pop("run"), config_of(**given))
