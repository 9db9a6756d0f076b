"""From words on a command line to a RunConfig: overrides with types, the task's own options filled in, differences.

Torch-free and quick to import; the task registry is imported when a configuration is resolved.
"""

import dataclasses
import typing
from collections.abc import Sequence

from stages.config import SECTIONS, OptionValue, RunConfig, UserError, unknown

# What `resume` may change: none of it is in a stage's key (stages/artifacts/keys.py).
RESUMABLE = (
    "train.iterations",
    "evaluate.every",
    "rollout.cache_bytes",
    "update.memory_bytes",
    "steps.",
    "sandbox.containers",
    "logging.",
)


def overridden(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """`config` with every `section.key=value` applied in order; UserError for what is unknown or wrong.

    Example: overridden(tiny(), ["train.seed=1", "task.size=5"])
    """
    body = config.to_dict()
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        section, dot, key = name.partition(".")
        if not equals or not dot or not key:
            owners = [f"{each}.{name}" for each, kind in SECTIONS.items() if name in typing.get_type_hints(kind)]
            hint = f"did you mean {owners[0]}={text}?" if equals and owners else "for example train.iterations=8"
            raise UserError(f"{assignment!r} is not section.key=value", hint)
        if section not in SECTIONS:
            raise unknown(f"section {section!r} in {assignment!r}", section, SECTIONS)
        body[section][key] = parsed(section, key, text)
    return RunConfig.from_dict(body)


def parsed(section: str, key: str, text: str) -> OptionValue:
    """The value that `text` stands for under section.key, by the key's type."""
    if section == "task":
        return text if key == "name" else guessed(text)
    kinds = typing.get_type_hints(SECTIONS[section])
    if key not in kinds:
        raise unknown(f"key {section}.{key}", key, kinds, prefix=f"{section}.")
    kind = kinds[key]
    value = guessed(text)
    if kind is int and isinstance(value, float) and value.is_integer() and "." not in text:
        return int(value)  # 1e6
    if kind in (str, bool, int, float) and kind is not str:
        return value  # of another type it is refused by stages.config with the key's name
    return text


def guessed(text: str) -> OptionValue:
    """true and false, whole numbers, numbers; anything else is a word."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def resolved(config: RunConfig) -> RunConfig:
    """`config` with every option of its task written out; UserError where a run cannot be made of it."""
    from stages.tasks import registry

    if config.steps.runner == "docker" and config.sandbox.backend != "docker":
        raise UserError(
            f"steps.runner=docker judges in Docker's sandboxes, not with sandbox.backend={config.sandbox.backend}",
            "leave sandbox.backend as it is, or use steps.runner=process",
        )
    if config.update.overlong_tokens > config.rollout.max_new_tokens:
        raise UserError(
            f"update.overlong_tokens={config.update.overlong_tokens} is more than rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens}: no completion could escape the penalty",
            f"for example update.overlong_tokens={config.rollout.max_new_tokens // 5}",
        )
    task = registry.of(config)
    registry.check(config.task.name, config.task.option_values())
    options = tuple(dataclasses.asdict(task.options).items())
    return dataclasses.replace(config, task=dataclasses.replace(config.task, options=options))


def differences(old: RunConfig, new: RunConfig) -> list[tuple[str, OptionValue, OptionValue]]:
    """(key, old value, new value) for every key that differs, in name order; "unset" stands for an absent key."""
    before, now = old.flat(), new.flat()
    return [
        (key, before.get(key, "unset"), now.get(key, "unset"))
        for key in sorted({*before, *now})
        if before.get(key, "unset") != now.get(key, "unset")
    ]


def shown(changes: Sequence[tuple[str, OptionValue, OptionValue]]) -> str:
    """Differences in one line."""
    return ", ".join(f"{key} {old} -> {new}" for key, old, new in changes)


def continues(old: RunConfig, new: RunConfig) -> bool:
    """Whether a run of `old` may go on as `new`: they differ in nothing but what `resume` may change."""
    return all(change[0].startswith(RESUMABLE) for change in differences(old, new))


def resumed(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """The configuration a run goes on with; UserError when an assignment would change what is already made."""
    changed = overridden(config, assignments)
    refused = [change for change in differences(config, changed) if not change[0].startswith(RESUMABLE)]
    if refused:
        raise UserError(
            f"resume cannot change {shown(refused)}",
            "it may change train.iterations, evaluate.every, rollout.cache_bytes, update.memory_bytes, steps.*, "
            "sandbox.containers and logging.*; for anything else start a new run with: flexsink train",
        )
    return resolved(changed)
