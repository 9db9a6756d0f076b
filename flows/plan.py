"""`flexsink plan`: what a resume would run and what it would reuse, decided by the same code."""

import inspect
import re
import typing

from flows.train import stages_of
from stages.artifacts import Decision, RunDir, StageId, survey
from stages.artifacts.journal import SUFFIX
from stages.artifacts.manifest import code_digest, task_digest, versions
from stages.config import SECTIONS, RunConfig
from stages.tasks import registry


def show_run(run: RunDir, config: RunConfig) -> None:
    """Prints the table for a run, then a warning for everything reused that other code or versions made."""
    decisions = survey(run, config, list(stages_of(config)))
    show([(stage, decision.action, decision.reason + begun(run, stage, decision)) for stage, decision in decisions])
    for line in warnings(decisions, config.task.name):
        print(f"warning: {line}")


def begun(run: RunDir, stage: StageId, decision: Decision) -> str:
    """What a killed try of the stage finished, which running it will not make again: "; 5 completions are kept"."""
    if decision.action != "RUN" or not decision.key:
        return ""
    journals = sorted((run.folder(stage).parent / f".tmp-{decision.key}").glob(f"*{SUFFIX}"))
    counts = [(path.read_bytes().count(b"\n"), path.name.removesuffix(SUFFIX)) for path in journals]
    return "".join(f"; {count} {name} are kept" for count, name in counts if count)


def show_preset(preset: RunConfig, config: RunConfig) -> None:
    """Prints the settings of a run that is not there yet, those that are not the preset's marked, and its stages."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for name in ("setting", "value", "what it is"):
        table.add_column(name, overflow="fold")
    usual, told = preset.flat(), explained(config)
    sections = list(SECTIONS)
    for key, value in sorted(config.flat().items(), key=lambda item: sections.index(item[0].partition(".")[0])):
        changed = value != usual.get(key)
        shown = f"{value} (preset: {usual.get(key)})" if changed else str(value)
        table.add_row(Text(key), Text(shown, "bold" if changed else ""), Text(told.get(key, ""), "dim"))
    console.print(table)
    stages = list(stages_of(config))
    evaluated = ", ".join(str(stage.index) for stage in stages if stage.name == "evaluate")
    console.print(
        f"\n{len(stages)} stages to run: load; {config.train.iterations} x (rollout, score, update); "
        f"evaluate {evaluated}; {stages[-1]}"
    )


def explained(config: RunConfig) -> dict[str, str]:
    """What each setting is, by its key: its choices, and the comment at its field in stages/config.py or the task."""
    found: dict[str, str] = {}
    for name, kind in {**SECTIONS, "task": type(registry.of(config).options)}.items():
        try:
            source = inspect.getsource(kind)
        except OSError:  # a task without its source
            continue
        for field in re.finditer(r"^    (\w+): .*?(?:\n    |  )# (.*)$", source, re.MULTILINE):
            choices = typing.get_args(typing.get_type_hints(kind)[field[1]])
            found[f"{name}.{field[1]}"] = " | ".join(choices) + ": " * bool(choices) + field[2]
    return found | {"task.name": "2048, matmul, or a task of your own"}


def show(rows: list[tuple[StageId, str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "", "why"):
        table.add_column(name, overflow="fold")
    for stage, action, reason in rows:
        table.add_row(str(stage), f"[bold]{action}[/]" if action == "RUN" else f"[dim]{action}[/]", reason)
    console.print(table)
    to_run = sum(action == "RUN" for _, action, _ in rows)
    console.print(f"{to_run} to run, {len(rows) - to_run} to reuse")


def warnings(decisions: list[tuple[StageId, Decision]], task: str) -> list[str]:
    """One line per difference between what made the reused stages and what is here now."""
    others: dict[str, list[StageId]] = {}
    for stage, decision in decisions:
        if decision.manifest is None:
            continue
        recorded = decision.manifest.recorded
        if recorded.get("code") != code_digest():
            others.setdefault("other code under stages/", []).append(stage)
        if recorded.get("task_code", "") != task_digest(task):
            others.setdefault(f"other code of the task {task}", []).append(stage)
        there, here = recorded.get("versions", {}), versions(task)
        contained = recorded.get("runner") == "docker"
        # An image holds what its stages need of the packages here, and another patch of this Python.
        for name in sorted(there if contained else {*there, *here}):
            old, new = there.get(name, "none"), here.get(name, "none")
            if contained and name == "python":
                old, new = (version.rpartition(".")[0] for version in (old, new))
            if old != new:
                others.setdefault(f"{name} {old}, now {new}", []).append(stage)
    lines = []
    for what, made in others.items():
        which = f"{made[0]} was" if len(made) == 1 else f"{len(made)} stages, {made[0]} to {made[-1]}, were"
        lines.append(f"{which} made with {what}: run again, the result may differ")
    return lines
