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
from stages.config import (
    EvaluateConfig,
    ExportConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    UpdateConfig,
)
from stages.sandbox.protocol import Outcome, Result
from stages.tasks import programs, registry, tables
from stages.tasks.game2048.baselines import BASELINES
from stages.tasks.game2048.rules import Game
from stages.tasks.matmul.baselines import BASELINES as PRODUCTS

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
WRONG = "def matmul(A, B):\n    return A\n"
FAMILIES_OF_PRODUCTS = ("three_loops", "columns_each", "columns_once")  # each made out to be twice as fast
FAMILIES = ("random", "fixed_order", "greedy", "look_ahead")
POOL = 12  # different games of each family; completions share them, as only their spread matters here


def config_of(
    *, iterations: int, prompts: int, group_size: int, programs: int = 16, every: int = 0, task: str = "game2048"
) -> RunConfig:
    """The configuration of a synthetic run."""
    return RunConfig(
        preset="tiny",
        task=TaskConfig(name=task),
        model=ModelConfig(source=str(Path(__file__).parent.parent / "data" / "tiny")),
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
    prompt = registry.of(config).prompt()
    rows = []
    for group in range(config.rollout.prompts):
        for sample in range(config.rollout.group_size):
            draw = random.Random(f"{i}-{group}-{sample}")
            text = completion(draw, progress(context), config.task.name)
            ids = encoded(text)
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
                    "completion_ids": ids,
                    "engine_logprobs": noise()[: len(ids)],
                    "finish_reason": "stop" if text.endswith("<|return|>") else "length",
                    "seed": draw.getrandbits(62),
                    "num_tokens": len(ids),
                }
            )
    write_parts(context.out, "rollouts", rows, ROLLOUTS)
    total = sum(row["num_tokens"] for row in rows)
    seconds = time.perf_counter() - began
    timing = {"seconds": seconds, "num_tokens": total, "tokens_per_s": total / seconds, "peak_bytes": 700 << 20}
    context.timings += [{"what": "decode", **timing}, {"what": "prefill", "seconds": 0.01 * seconds}]


def score(context: StageContext) -> None:
    task = registry.of(context.config)
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
                task.cases: list(verdict.cases),
                "detail": verdict.detail,
                **checked(str(verdict.outcome), program),
            }
        )
    write_parts(context.out, "scores", judged, tables.scores(task))
    context.timings.append({"what": "sandbox", "seconds": 1e-4 * len(rows), "peak_bytes": 90 << 20})


def update(context: StageContext) -> None:
    i, draw, done = context.stage.index or 0, random.Random(context.stage.index), progress(context)
    scores = read_table(context.input(StageId("score", i)), "scores", columns=["completion_id", "reward"]).to_pylist()
    lengths = read_table(context.input(StageId("rollout", i)), "rollouts", columns=["num_tokens"])["num_tokens"]
    means: dict[str, float] = {}
    for row in scores:
        group = row["completion_id"][:9]
        means[group] = means.get(group, 0.0) + row["reward"] / context.config.rollout.group_size
    (context.out / "adapter.safetensors").write_bytes(bytes([i % 256]) * 64)
    write_parts(
        context.out,
        "samples",
        [
            {
                "completion_id": row["completion_id"],
                "advantage": row["reward"] - means[row["completion_id"][:9]],
                "loss_mask": [True] * length,
                "policy_logprobs": noise()[1 : length + 1],
                "reference_logprobs": noise()[2 : length + 2],
            }
            for row, length in zip(scores, lengths.to_pylist(), strict=True)
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
    task = registry.of(config)
    rows = []
    for n in range(config.evaluate.programs):
        draw = random.Random(f"{context.stage.index}-{n}")
        text = completion(draw, progress(context), config.task.name)
        verdict, program = judge(task, text, draw)
        rows.append(evaluation(task, "policy", "policy", f"e{context.stage.index:05d}-{n:04d}", text, program, verdict))
    matmul = config.task.name == "matmul"
    for name in FAMILIES_OF_PRODUCTS if matmul else FAMILIES:
        for n in range(4):
            program = PRODUCTS[name] if matmul else BASELINES[name]
            result = products(program, random.Random(n)) if matmul else ended("ok", pool(name)[n::4])
            rows.append(evaluation(task, "baseline", name, None, None, program, task.score(result)))
    write_parts(context.out, "evaluations", rows, tables.evaluations(task))
    names = dict.fromkeys((row["kind"], row["name"]) for row in rows)
    sums = [summary(task, kind, name, [row for row in rows if row["name"] == name]) for kind, name in names]
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


def completion(draw: random.Random, done: float, task: str = "game2048") -> str:
    """What a policy that has come so far answers."""
    thought = "<|channel|>analysis<|message|>Merge early, keep the large tiles together.<|end|><|start|>assistant"
    if draw.random() < 0.04 * (1 - done):
        return thought.removesuffix("<|start|>assistant")[: draw.randrange(40, 60)]
    if task == "matmul":
        weights = [4 - 3 * done, 3 - 2 * done, 2.0, 0.4 + 5 * done]
        program = draw.choices([WRONG, *(PRODUCTS[name] for name in FAMILIES_OF_PRODUCTS)], weights)[0]
    elif draw.random() < 0.45 - 0.35 * done:
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
    if task.name == "matmul":
        return task.score(products(program, draw)), program
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


def products(program: str, draw: random.Random) -> Result:
    """What a sandbox would have said of a program for matmul; its speed is made up."""
    speed = {WRONG: None, **{PRODUCTS[name]: 2.0**at for at, name in enumerate(FAMILIES_OF_PRODUCTS)}}[program]
    right = speed is not None
    cases = [
        {"seed": 2 * n, "rows": 24, "inner": 30, "columns": 40, "products": 16, "error": 1e-16 if right else 3.5,
         "speedup": speed * draw.uniform(0.9, 1.1) if right else None, "program_ms": 2.0 / speed if right else None,
         "baseline_ms": 2.0 if right else None, "state": "right" if right else "wrong", "detail": ""}
        for n in range(2)
    ]  # fmt: skip
    return ended("ok", cases)


def checked(outcome: str, program: str | None) -> dict[str, Any]:
    """What the checks of stages/tasks/checks.py would say: only programs that ran to their end are known."""
    if outcome != "ok" or program is None:
        return {}
    return {
        "depends_on_board": "board" in program.split("def strategy(board):")[-1] if "strategy" in program else None,
        "depends_on_calls": "random" in program if "strategy" in program else None,
        "depends_on_random": "random" in program if "strategy" in program else None,
        "depends_on_time": False,
        "state_kept": "",
    }


@functools.cache
def encoded(text: str) -> list[int]:
    """The ids of a text in the bundled model's tokenizer."""
    ids: list[int] = tokenizer().encode(text, add_special_tokens=False).ids
    return ids


@functools.cache
def tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(__file__).parent.parent / "data" / "tiny" / "tokenizer.json"))


@functools.cache
def noise() -> list[float]:
    """Logprobs of as many tokens as a completion can have, one in ten of them unlikely."""
    draw = random.Random(0)
    return [-abs(draw.gauss(0, 0.5)) - 4 * (draw.random() < 0.1) for _ in range(2000)]


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
    task: Any, kind: str, name: str, completion_id: str | None, text: str | None, program: str | None, verdict: Any
) -> dict[str, Any]:
    """A row of an evaluation."""
    return {
        "kind": kind,
        "name": name,
        "completion_id": completion_id,
        "completion": text,
        "program": program,
        "outcome": str(verdict.outcome),
        "syntax_tree": programs.syntax_tree(program) if program else None,
        **task.measure(list(verdict.cases)),
        task.cases: list(verdict.cases),
    }


def summary(task: Any, kind: str, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the summary; the intervals are those of a normal distribution."""
    games = [game for row in rows for game in row[task.cases]]
    body: dict[str, Any] = {
        "kind": kind,
        "name": name,
        "programs": len(rows),
        "distinct_programs": len({row["syntax_tree"] for row in rows}),
        task.cases: len(games),
    }
    if task.tally:
        tiles = [game["max_tile"] for game in games]
        body["tiles"] = [{"tile": tile, "games": tiles.count(tile)} for tile in sorted(set(tiles))]
    for column in (figure.name for figure in task.figures):
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
    parser.add_argument("--task", default="game2048")
    given = vars(parser.parse_args())
    write(given.pop("run"), config_of(**given))
