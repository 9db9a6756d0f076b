"""What each stage reads, on one screen: the table that decides when a finished stage may be used again.

A stage's key is the sha256 of its name, index, STAGE_VERSION, the config values it reads (the seed is one of them) and
the content digests of the stages it reads. Raise a STAGE_VERSION by hand when the stage would write something else from
the same input. In no key: train.iterations, evaluate.every, rollout.cache_bytes, update.memory_bytes, steps.*,
sandbox.{containers,backend,runtime}, logging.*.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from stages.artifacts.stage import StageId
from stages.config import OptionValue, RunConfig, canonical_json


class Stage(NamedTuple):
    version: int
    reads: tuple[str, ...]
    # config keys; a trailing * takes the whole section
    upstream: Callable[[int], list[StageId]]
    # from the stage's index to what it reads


def after(updates: int) -> list[StageId]:
    """What holds the policy after that many updates."""
    return [StageId("load")] + ([StageId("update", updates - 1)] if updates else [])


def trained_on(iteration: int) -> list[StageId]:
    return [*after(iteration), StageId("rollout", iteration), StageId("score", iteration)]


def exported_from(updates: int) -> list[StageId]:
    """The policy, and the evaluations that say what its training gained."""
    return [*after(updates), *dict.fromkeys((StageId("evaluate", 0), StageId("evaluate", updates)))]


SAMPLING = ("rollout.max_new_tokens", "rollout.temperature", "rollout.max_slots")
JUDGING = ("task.*", "sandbox.cpu_s", "sandbox.memory_bytes", "train.seed")
PLAYING = ("evaluate.programs", "evaluate.games", *SAMPLING, *JUDGING)
NOT_READ = "update.memory_bytes"  # though update.* is: a smaller card may go on with a run
ADAPTER = ("update.lora_rank", "update.lora_alpha", "update.lora_dtype")

STAGES: dict[str, Stage] = {
    "load": Stage(1, ("model.*",), lambda _: []),
    "rollout": Stage(
        1,
        ("rollout.prompts", "rollout.group_size", *SAMPLING, "task.*", "train.seed", *ADAPTER, "update.replay_routes"),
        after,
    ),
    "score": Stage(2, JUDGING, lambda i: [StageId("rollout", i)]),
    "update": Stage(2, ("update.*", "rollout.max_new_tokens", "rollout.temperature", "train.seed"), trained_on),
    "evaluate": Stage(1, (*PLAYING, *ADAPTER), after),
    "export": Stage(1, ("model.*", *PLAYING, *ADAPTER), exported_from),
}


def upstream_of(stage: StageId) -> tuple[StageId, ...]:
    """The stages whose content this one reads."""
    return tuple(STAGES[stage.name].upstream(stage.index or 0))


def inputs_of(stage: StageId, config: RunConfig, digests: Mapping[StageId, str]) -> dict[str, Any]:
    """Everything the key is made of, readable: kept in the manifest so that a later difference can be named."""
    entry = STAGES[stage.name]
    values: dict[str, OptionValue] = {}
    for key, value in config.flat().items():
        if key != NOT_READ and any(
            key == pattern or (pattern.endswith("*") and key.startswith(pattern[:-1])) for pattern in entry.reads
        ):
            values[key] = value
    if stage.name == "export":
        values["export.format"] = stage.label
    return {
        "stage": stage.name,
        "index": stage.index,
        "version": entry.version,
        "config": values,
        "upstream": {str(other): digests[other] for other in upstream_of(stage)},
    }


def key_of(inputs: Mapping[str, Any]) -> str:
    """The sha256 of a stage's inputs, as hex."""
    return hashlib.sha256(canonical_json(inputs).encode()).hexdigest()


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What changed between the inputs of two keys, in one line."""
    parts = []
    for key in sorted({*old.get("config", {}), *new["config"]}):
        before, now = old.get("config", {}).get(key, "unset"), new["config"].get(key, "unset")
        if before != now:
            parts.append(f"{key} {before} -> {now}")
    for name in sorted({*old.get("upstream", {}), *new["upstream"]}):
        if old.get("upstream", {}).get(name) != new["upstream"].get(name):
            parts.append(f"{name} changed")
    if old.get("version") != new["version"]:
        parts.append(f"stage version {old.get('version')} -> {new['version']}")
    return ", ".join(parts) or "made under another key"
