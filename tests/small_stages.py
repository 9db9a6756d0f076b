"""The command `flexsink` with stages that need no model: they write real tables through the real run directory.

    python -m tests.small_stages train tiny_test --run-dir R

What a stage writes follows from the seed and from what it reads, so that a resumed run can be compared with another.
SMALL_STAGES makes them misbehave: "pause" sleeps ten minutes in rollout 1, "fail" fails there, "slow" sleeps in
every one. "@FILE" reads the mood from a file, for a process that outlives it.
"""

import hashlib
import os
import sys
import time
import types
from pathlib import Path

from stages.artifacts import StageContext, derive
from stages.artifacts.parquet import METRICS, scores_schema, write_parts, write_table
from stages.config import UserError
from stages.tasks import registry, tables


def read(context: StageContext) -> str:
    """A digest of everything the stage may read, timings left out."""
    digest = hashlib.sha256(str((context.config.train.seed, context.stage)).encode())
    for stage in context.upstream:
        for path in sorted(context.input(stage).iterdir()):
            if path.name not in ("timings.parquet", "manifest.json"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def load(context: StageContext) -> None:
    (context.out / "model.json").write_text(read(context))


def mood_of_the_day() -> str:
    mood = os.environ.get("SMALL_STAGES", "")
    return Path(mood[1:]).read_text() if mood.startswith("@") else mood


def rollout(context: StageContext) -> None:
    mood = mood_of_the_day()
    journal = context.journal("completions")
    done = {record["piece"]: record["text"] for record in journal.records()}
    for piece in range(4):
        if piece not in done:
            done[piece] = str(derive(read(context), piece))
            journal.append({"piece": piece, "text": done[piece]})
        context.progress(piece + 1, 4, "completions", **{"tokens/s": 100.0})
        if context.stage.index == 1 and piece == 1 and mood == "pause":
            print("pausing", file=sys.stderr, flush=True)
            time.sleep(600)
        if context.stage.index == 1 and mood == "fail":
            raise UserError("the tokens ran out", "buy more tokens")
        if context.stage.index == 1 and mood == "bug":
            raise ZeroDivisionError("a bug in a stage")
        if mood == "slow":
            time.sleep(0.05)
    (context.out / "completions.txt").write_text("\n".join(done[piece] for piece in sorted(done)))


def score(context: StageContext) -> None:
    rewards = [derive(read(context), piece) % 100 / 10 for piece in range(4)]
    rows = [
        {"completion_id": str(piece), "outcome": "ok", "reward": reward, "reward_works": reward}
        for piece, reward in enumerate(rewards)
    ]
    write_parts(context.out, "scores", rows, scores_schema(["works"]))
    context.progress(4, 4, "completions", **{"mean reward": sum(rewards) / 4})


def update(context: StageContext) -> None:
    write_parts(context.out, "metrics", [{"iteration": context.stage.index, "step": 0, "loss": 0.5}], METRICS)
    (context.out / "adapter.txt").write_text(read(context))


def evaluate(context: StageContext) -> None:
    score = float(derive(read(context)) % 1000)
    task = registry.of(context.config)
    row = {"kind": "policy", "name": "policy", "programs": 8, "distinct_programs": 5, task.cases: 16}
    for figure in task.figures:
        value = 0.0 if figure.share else score
        row |= {figure.name: value, f"{figure.name}_low": value, f"{figure.name}_high": value}
    row |= {f"{task.figures[0].name}_low": score - 1, f"{task.figures[0].name}_high": score + 1}
    write_table(context.out / "summary.parquet", [row], tables.summary(task))


def export(context: StageContext) -> None:
    (context.out / "model.txt").write_text(read(context))
    (context.out / "export.json").write_text('{"gain_kept": 0.5}')


def install() -> None:
    """Puts these functions where the flow looks for stages."""
    for function in (load, rollout, score, update, evaluate, export):
        module = types.ModuleType(f"stages.{function.__name__}")
        module.run = function  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module


if __name__ == "__main__":
    install()
    from flows.cli import main

    main()
