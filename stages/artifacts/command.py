"""A stage on its own: `python -m stages.rollout --run-dir R --iteration 3`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from stages.artifacts.execute import execute, survey
from stages.artifacts.keys import upstream_of
from stages.artifacts.run import RunDir
from stages.artifacts.stage import Progress, Session, StageContext, StageId
from stages.config import RunConfig, UserError, pasteable
from stages.config import replace as replace_config
from stages.exits import guarded


def main(name: str, run: Callable[[StageContext], None]) -> None:
    """Runs one stage of an existing run and exits: 0 done, 2 with an error line, 130 interrupted."""
    parser = argparse.ArgumentParser(prog=f"python -m stages.{name}")
    parser.add_argument("--run-dir", type=Path, required=True, metavar="DIR", help="the run's folder")
    if name in ("rollout", "score", "update"):
        parser.add_argument("--iteration", type=int, required=True, metavar="N", help="counted from 0")
    elif name == "evaluate":
        parser.add_argument("--updates", type=int, required=True, metavar="N", help="updates the policy has had")
    elif name == "export":
        parser.add_argument("--format", choices=("mxfp4", "fp16", "bf16", "adapter"), help="instead of the config's")
    args = parser.parse_args()
    again = pasteable("python", "-m", f"stages.{name}", *sys.argv[1:])
    sys.exit(guarded(lambda: run_one(name, run, args), resume=again))


def run_one(name: str, function: Callable[[StageContext], None], args: argparse.Namespace) -> int:
    run = RunDir.open(args.run_dir)
    config = run.config()
    stage = StageId(name, getattr(args, "iteration", getattr(args, "updates", None)))
    if name == "export":
        if args.format:
            config = replace_config(config, "export", format=args.format)
        stage = StageId(name, config.train.iterations, config.export.format)
    require_upstream(run, config, stage)
    with Session() as session:
        execute(run, config, stage, function, session, print_progress)
    print(f"{stage}: {run.folder(stage)}")
    return 0


def require_upstream(run: RunDir, config: RunConfig, stage: StageId) -> None:
    """Returns when everything `stage` follows from is done and undamaged; UserError naming the first that is not."""
    if stage.index is not None and not 0 <= stage.index <= config.train.iterations:
        raise UserError(f"{stage} is not in this run of {config.train.iterations} iterations", "they count from 0")
    for other, decision in survey(run, config, every_upstream(stage)):
        if decision.action == "RUN":
            hint = f"run what is missing with: {pasteable('flexsink', 'resume', run.path)}"
            raise UserError(f"{stage} needs {other}: {decision.reason}", hint)


def every_upstream(stage: StageId) -> list[StageId]:
    """Everything `stage` follows from, in an order in which it can be made."""
    order: list[StageId] = []
    todo = [(stage, False)]
    while todo:
        current, expanded = todo.pop()
        if current in order:
            continue
        if expanded:
            order.append(current)
        else:
            todo.append((current, True))
            todo.extend((other, False) for other in upstream_of(current))
    return order[:-1]


def print_progress(progress: Progress) -> None:
    if progress.done == progress.total:
        fields = "  ".join(f"{name} {value}" for name, value in progress.fields.items())
        print(f"{progress.stage}: {progress.done} {progress.unit}  {fields}".rstrip(), file=sys.stderr)
