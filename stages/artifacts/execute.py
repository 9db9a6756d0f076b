"""The one way a stage is run: decide from the disk whether it must, then write it so that no kill does harm.

    decide -> lock -> .tmp-<key> -> the function -> fsync -> manifest -> older folder aside -> rename -> fsync parent

A stage is done when its manifest is there, has the key that its inputs give now, and every sha256 in it is right.
Until the rename nothing of a try is visible under the stage's name; after it, everything is. What a killed try leaves,
`.tmp-<key>`, is emptied by the next one but for its journals.
"""

import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from stages.artifacts.journal import SUFFIX
from stages.artifacts.keys import difference, inputs_of, key_of, upstream_of
from stages.artifacts.manifest import NAME, Manifest, fsync, recorded
from stages.artifacts.manifest import TIMINGS as TIMINGS_FILE
from stages.artifacts.run import RunDir, explained, locked
from stages.artifacts.stage import Report, Session, StageContext, StageId, silent
from stages.config import RunConfig, UserError, pasteable


class Decision(NamedTuple):
    """Example: Decision("RUN", "rollout.temperature 1.0 -> 0.9", "5f2c...", {...}, None)"""

    action: Literal["RUN", "REUSE"]
    reason: str
    key: str
    inputs: dict[str, Any]
    manifest: Manifest | None
    # the finished one when the action is REUSE


def decide(run: RunDir, config: RunConfig, stage: StageId, upstream_digests: Mapping[StageId, str]) -> Decision:
    """Whether the stage has to run, and why. Every file is read and its sha256 compared; nothing is written."""
    inputs = inputs_of(stage, config, upstream_digests)
    key = key_of(inputs)
    folder = run.folder(stage)
    manifest = Manifest.read(folder)
    if manifest is None:
        if not folder.exists():
            return Decision("RUN", "not done yet", key, inputs, None)
        return Decision("RUN", f"{NAME} is missing or corrupt", key, inputs, None)
    if manifest.key != key:
        return Decision("RUN", difference(manifest.inputs, inputs), key, inputs, None)
    damage = manifest.damage(folder)
    if damage:
        return Decision("RUN", damage, key, inputs, None)
    return Decision("REUSE", "done, every file as recorded", key, inputs, manifest)


def look(run: RunDir, config: RunConfig, stage: StageId, digests: Mapping[StageId, str] | None = None) -> Decision:
    """The decision on a stage whose upstream is done; UserError when that is missing or damaged.

    digests: of the upstream where it has just been verified. Journals that a kill right behind the rename left in a
    finished stage's folder are removed.
    """
    if digests is None:
        digests = {other: finished_digest(run, other, stage) for other in upstream_of(stage)}
    decision = decide(run, config, stage, digests)
    if decision.manifest is not None:
        with explained(run.path):
            remove_journals(run.folder(stage))
    return decision


def execute(
    run: RunDir,
    config: RunConfig,
    stage: StageId,
    function: Callable[[StageContext], None],
    session: Session,
    report: Report = silent,
    **where: str,
) -> Manifest:
    """The stage's manifest: found valid, or made now by calling `function`. Its upstream must be done.

    where: recorded in the manifest: the runner, and the image of a container.

    Errors: UserError when the upstream is missing or damaged, the disk or the card is full, the folder cannot be
    written; whatever else `function` raises. After an error the run directory is as it was, but for `.tmp-<key>`.
    """
    folder = run.folder(stage)
    digests = {other: finished_digest(run, other, stage) for other in upstream_of(stage)}
    decision = look(run, config, stage, digests)
    if decision.manifest is not None:
        return decision.manifest
    busy = f"{stage} is being run by another process"
    with explained(run.path), locked(folder.parent / f".lock-{folder.name}", busy, wait=True):
        decision = look(run, config, stage, digests)
        if decision.manifest is not None:
            return decision.manifest  # another process finished it while this one waited
        temporary = folder.parent / f".tmp-{decision.key}"
        prepare(temporary)
        context = StageContext(
            run=run,
            config=config,
            stage=stage,
            out=temporary,
            session=session,
            report=report,
            key=decision.key,
            upstream=upstream_of(stage),
        )
        started = time.perf_counter()
        make(context, function)
        write_timings(context, time.perf_counter() - started)
        sync_all(temporary)
        made = recorded(task=config.task.name, **{"runner": "process", **where})
        manifest = Manifest.of(temporary, key=decision.key, inputs=decision.inputs, recorded=made)
        manifest.write(temporary)
        set_aside(folder)
        os.rename(temporary, folder)
        fsync(folder.parent)
        remove_journals(folder)
    return manifest


def make(context: StageContext, function: Callable[[StageContext], None]) -> None:
    """Runs the stage. UserError instead of torch's error when the card's memory runs out."""
    try:
        function(context)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # nothing here imports torch
            raise
        less = "update.memory_bytes=12000000000" if context.stage.name == "update" else "rollout.cache_bytes=2000000000"
        raise UserError(
            f"the card's memory ran out in {context.stage}: {str(error).splitlines()[0]}",
            "end what else uses the card, or give the stage less of it; then go on, for example with: "
            + pasteable("flexsink", "resume", context.run.path, less),
        ) from None


def remove_journals(folder: Path) -> None:
    for journal in folder.rglob(f"*{SUFFIX}"):
        journal.unlink(missing_ok=True)


def finished_digest(run: RunDir, stage: StageId, reader: StageId) -> str:
    """The content digest of a stage that `reader` reads, its files verified."""
    manifest = run.manifest(stage)
    hint = f"make it with: {pasteable('flexsink', 'resume', run.path)}"
    if manifest is None:
        raise UserError(f"{reader} needs {stage}, which is not done", hint)
    damage = manifest.damage(run.folder(stage))
    if damage:
        raise UserError(f"{reader} needs {stage}, but {damage}", hint)
    return manifest.digest


def prepare(temporary: Path) -> None:
    """An unfinished folder that holds nothing but the journals of an earlier try."""
    temporary.mkdir(parents=True, exist_ok=True)
    for entry in temporary.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif not entry.name.endswith(SUFFIX):
            entry.unlink()


def write_timings(context: StageContext, seconds: float) -> None:
    from stages.artifacts.parquet import TIMINGS, write_table

    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows = [*context.timings, {"what": "stage", "seconds": seconds, "peak_bytes": peak_bytes}]
    write_table(context.out / TIMINGS_FILE, rows, TIMINGS)


def sync_all(folder: Path) -> None:
    """Returns when every file and folder below is on the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        fsync(path)
    fsync(folder)


def set_aside(folder: Path) -> None:
    """Renames an older, invalid folder to .stale-<name>-<n>, so that nothing a person may want to look at is lost."""
    if not folder.exists():
        return
    number = 0
    while (target := folder.parent / f".stale-{folder.name}-{number}").exists():
        number += 1
    os.rename(folder, target)


def survey(run: RunDir, config: RunConfig, stages: Iterator[StageId] | list[StageId]) -> list[tuple[StageId, Decision]]:
    """What running `stages` in this order would do: each stage's decision, made without running any.

    A stage after one that has to run is decided with what that one wrote before; where nothing is there, it runs.
    """
    digests: dict[StageId, str] = {}
    reruns: set[StageId] = set()
    decisions = []
    for stage in stages:
        above = upstream_of(stage)
        waiting = [other for other in above if other not in digests]
        if waiting:
            decision = Decision("RUN", f"{waiting[0]} is not done", "", {}, None)
        else:
            decision = decide(run, config, stage, digests)
        changed = [other for other in above if other in reruns]
        if changed and decision.action == "REUSE":
            decision = decision._replace(action="RUN", reason=f"unless {changed[0]} comes out as before", manifest=None)
        manifest = run.manifest(stage)
        if decision.action == "RUN":
            reruns.add(stage)
            if manifest is not None and manifest.key == decision.key:
                digests[stage] = manifest.digest  # damaged, but made again it should be the same
        elif manifest is not None:
            digests[stage] = manifest.digest
        decisions.append((stage, decision))
    return decisions
