"""The configuration of a run: one frozen dataclass per section, and the error every expected failure raises.

A RunConfig is complete (every value is in it), frozen, and travels as canonical JSON: what a stage reads here is what
its key is made of (stages/artifacts/keys.py). Reading it back is strict: an unknown section or key, a wrong type or a
value out of range is a UserError. Standard library only. Presets and `section.key=value` overrides: flows/config.py.
"""

import dataclasses
import difflib
import json
import math
import shlex
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

OptionValue = bool | int | float | str


class UserError(Exception):
    """An expected failure: what is wrong in `message`, what to do about it in `hint`.

    The command line prints both as one line each and exits 2; nothing else ever shows a traceback for it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.message, self.hint))


NOT_FINITE_HINT = "lower update.learning_rate, or use model.dtype=bfloat16 or float32; the last good checkpoint is kept"


def pasteable(*words: object) -> str:
    """The words as one line that a shell reads back.

    Example: pasteable("flexsink", "resume", Path("my runs/a")) is "flexsink resume 'my runs/a'"
    """
    return shlex.join(str(word) for word in words)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    iterations: int = 24
    # rollout-score-update rounds
    seed: int = 0
    # the one number every random stream of the run is derived from


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    source: str = "data/tiny"
    # a folder with a checkpoint, or a hub id
    experts: Literal["mxfp4", "dequantized"] = "mxfp4"
    # how the expert weights are held in memory
    dense: Literal["full", "nf4"] = "full"
    # how everything but the experts is held in memory
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # of activations and of weights that are not quantised
    offload_embedding: bool = False
    # keep the embedding in CPU memory


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    prompts: int = 4
    # P, groups per iteration
    group_size: int = 8
    # G, completions of one prompt
    max_new_tokens: int = 320
    # tokens sampled per completion at most
    temperature: float = 1.0
    # of the sampling policy; no top-k or top-p in training, they bias the ratio
    max_slots: int = 32
    # completions decoded at the same time
    cache_bytes: int = 0
    # keys and values on a GPU, at most; 0 takes what is free but for 3 GiB, and no run takes more than it can use


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"] = "grpo"
    # a row of LOSSES in stages/grpo.py
    scale_rewards: Literal["auto", "group", "batch", "none"] = "auto"
    # whose standard deviation advantages are divided by; auto is none for dr_grpo and group for the others
    overlong_tokens: int = 0
    # over the last so many tokens before max_new_tokens a completion's reward falls by up to 1; 0 is no penalty
    learning_rate: float = 5e-5
    # per optimizer step, after warm-up
    schedule_steps: int = 0
    # optimizer steps until the rate has fallen to zero linearly; 0 keeps it constant
    warmup_steps: int = 0
    # optimizer steps of linear warm-up
    kl: float = 0.0
    # weight of the KL divergence to the policy without its adapter
    clip: float = 0.0
    # the ratio is clipped to 1 - clip .. 1 + clip_high; 0 is the loss's own: 0.2, gspo 3e-4, cispo 1; sapo has no clip
    clip_high: float = 0.0
    # 0 is the loss's own: dapo 0.28, gspo 4e-4, cispo 4, the others as clip
    correction: Literal["none", "truncated", "masked"] = "none"
    # weighs each token by trainer / engine probability: at most the cap, or left out beyond it
    correction_cap: float = 2.0
    # truncated: weights are at most this; masked: tokens outside 1 / cap .. cap are left out
    steps: int = 2
    # optimizer steps per iteration
    pack_tokens: int = 4096
    # tokens in one forward and backward pass, prompts counted once for a group; a longer completion goes alone
    memory_bytes: int = 0
    # of a GPU that an update may take, weights included, at most; 0 is what no other program has of it
    replay_routes: bool = False
    # the experts that the engine chose are recorded in the rollout and used again by the update
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    # 8 bits need a GPU
    lora_dtype: Literal["float32", "bfloat16"] = "float32"
    # of adapters and their gradients
    also_train: Literal["none", "sinks", "router", "sinks+router"] = "none"
    # weights trained in full beside the adapters, in float32 and without weight decay
    max_grad_norm: float = 1.0
    # L2 norm the gradient is scaled down to
    weight_decay: float = 0.0
    # decoupled, per step, as in AdamW
    lora_rank: int = 8
    # r of the adapters
    lora_alpha: float = 16.0
    # adapters are scaled by alpha / r


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    every: int = 0
    # iterations between evaluations; 0 evaluates only before the first and after the last
    programs: int = 64
    # completions sampled per evaluation
    games: int = 4
    # held-out seeds every program is judged on


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    name: str = "game2048"
    # a name in stages/tasks/registry.py
    options: tuple[tuple[str, OptionValue], ...] = ()
    # the task's own options, sorted by name; written flat: task.size=4

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(sorted((str(key), value) for key, value in self.options)))
        for key, _ in self.options:
            if key == "name":
                raise UserError("task.name is not an option of a task", "give the task as task.name=NAME")

    def option_values(self) -> dict[str, OptionValue]:
        """The options as a dictionary, in name order."""
        return dict(self.options)


@dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    backend: Literal["docker", "local"] = "docker"
    # what isolates a program: a container, or for machines without Docker this kernel's own walls
    containers: int = 2
    # warm sandboxes in the pool
    cpu_s: float = 10.0
    # seconds of CPU one case of a program may use
    memory_bytes: int = 256 * 2**20
    # bytes of memory one program may use
    runtime: str = ""
    # a Docker runtime such as runsc; empty is the daemon's default


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    format: Literal["mxfp4", "fp16", "bf16", "adapter"] = "mxfp4"
    # what the last stage writes


@dataclass(frozen=True, kw_only=True)
class StepsConfig:
    runner: Literal["process", "docker"] = "process"
    # where a stage runs
    gpus: str = "auto"
    # of a container: none, all, numbers or UUIDs with commas between; auto is one where the machine has any
    memory_bytes: int = 0
    # bytes of memory a stage's container may use; 0 is no limit
    lock: str = "gpu"
    # what no other run may work on meanwhile: the GPU, none, or a name of your own (flows/devices.py)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    # of the log file in the run directory
    format: Literal["text", "json"] = "text"
    # of the log file and of what is printed while a run goes on
    tracker: Literal["none", "tensorboard", "wandb", "prometheus"] = "none"
    # what is told the figures of each finished stage (flows/tracking.py)


# Inclusive limits of the numbers; a key that is not here may have any finite value.
LIMITS: dict[str, tuple[float, float]] = {
    "train.iterations": (1, 1_000_000),
    "train.seed": (0, 2**63 - 1),
    "rollout.prompts": (1, 100_000),
    "rollout.group_size": (1, 100_000),
    "rollout.max_new_tokens": (1, 10_000_000),
    "rollout.temperature": (0.01, 100.0),
    "rollout.max_slots": (1, 100_000),
    "rollout.cache_bytes": (0, 2**44),
    "update.learning_rate": (0.0, 1e6),
    "update.schedule_steps": (0, 10**9),
    "update.warmup_steps": (0, 10**9),
    "update.overlong_tokens": (0, 10_000_000),
    "update.kl": (0.0, 1e6),
    "update.clip": (0.0, 1e6),
    "update.clip_high": (0.0, 1e6),
    "update.correction_cap": (1.0, 1e6),
    "update.steps": (1, 100_000),
    "update.pack_tokens": (1, 100_000_000),
    "update.memory_bytes": (0, 2**44),
    "update.max_grad_norm": (0.0, 1e9),
    "update.weight_decay": (0.0, 1e6),
    "update.lora_rank": (1, 65_536),
    "update.lora_alpha": (0.0, 1e6),
    "evaluate.every": (0, 1_000_000),
    "evaluate.programs": (1, 1_000_000),
    "evaluate.games": (1, 1_000_000),
    "sandbox.containers": (1, 4096),
    "sandbox.cpu_s": (0.01, 86_400.0),
    "sandbox.memory_bytes": (2**20, 2**44),
    "steps.memory_bytes": (0, 2**44),
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run is made of.

    Example: RunConfig(preset="tiny", train=TrainConfig(iterations=2)).to_json()
    """

    preset: str = ""
    train: TrainConfig = field(default_factory=TrainConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    steps: StepsConfig = field(default_factory=StepsConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def flat(self) -> dict[str, OptionValue]:
        """Every value under its dotted key, in name order: {"train.seed": 0, "task.size": 4, ...}."""
        values: dict[str, OptionValue] = {}
        for section, body in self.to_dict().items():
            if section != "preset":
                values.update({f"{section}.{key}": value for key, value in body.items()})
        return dict(sorted(values.items()))

    def to_dict(self) -> dict[str, Any]:
        """Sections as dictionaries; the task's options stand beside its name."""
        body: dict[str, Any] = {"preset": self.preset}
        for name in SECTIONS:
            section = getattr(self, name)
            if isinstance(section, TaskConfig):
                body[name] = {"name": section.name, **section.option_values()}
            else:
                body[name] = dataclasses.asdict(section)
        return body

    def to_json(self) -> str:
        return canonical_json(self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes) -> "RunConfig":
        try:
            body = json.loads(text)
        except ValueError as error:
            hint = "restore config.json, or start a new run"
            raise UserError(f"the configuration is not JSON: {error}", hint) from None
        if not isinstance(body, dict):
            raise UserError("the configuration is not a JSON object", "restore config.json, or start a new run")
        return cls.from_dict(body)

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> "RunConfig":
        """The config of nested sections; keys that are missing keep their defaults, unknown ones are refused."""
        values: dict[str, Any] = {"preset": str(body.get("preset", ""))}
        for name, section in body.items():
            if name == "preset":
                continue
            if name not in SECTIONS:
                raise unknown(f"section {name!r}", name, SECTIONS)
            if not isinstance(section, Mapping):
                raise UserError(f"section {name!r} must be an object, not {section!r}", f"its keys: {key_names(name)}")
            values[name] = read_section(name, section)
        return cls(**values)


SECTIONS: dict[str, type[Any]] = {
    "train": TrainConfig,
    "model": ModelConfig,
    "rollout": RolloutConfig,
    "update": UpdateConfig,
    "evaluate": EvaluateConfig,
    "task": TaskConfig,
    "sandbox": SandboxConfig,
    "export": ExportConfig,
    "steps": StepsConfig,
    "logging": LoggingConfig,
}


def read_section(name: str, body: Mapping[str, Any]) -> Any:
    """The frozen section `name` holding `body`; UserError for unknown keys, wrong types and values out of range."""
    if name == "task":
        options = tuple((key, value) for key, value in body.items() if key != "name")
        for key, value in options:
            if not isinstance(value, bool | int | float | str):
                raise UserError(f"task.{key} must be a number, a word or true/false, not {value!r}")
        return TaskConfig(name=checked("task.name", body.get("name", "game2048"), str), options=options)
    kinds = typing.get_type_hints(SECTIONS[name])
    values = {}
    for key, value in body.items():
        if key not in kinds:
            raise unknown(f"key {name}.{key}", key, kinds, prefix=f"{name}.")
        values[key] = checked(f"{name}.{key}", value, kinds[key])
    return SECTIONS[name](**values)


def checked(key: str, value: Any, kind: Any) -> Any:
    """`value` if it is of `kind` and within LIMITS, whole numbers made floats where a float is asked for."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            hint = f"for example {key}={choices[0]}"
            raise UserError(f"{key} must be one of {', '.join(choices)}, not {value!r}", hint)
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{key} must be {KIND_NAMES[kind]}, not {value!r}", example(key))
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key} must be finite, not {value!r}", example(key))
    if key in LIMITS:
        low, high = LIMITS[key]
        if not low <= value <= high:
            raise UserError(f"{key} must be {low:g} to {high:g}, not {value!r}", example(key))
    return value


KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def example(key: str) -> str:
    """A hint with the key's default value."""
    section, _, name = key.partition(".")
    default = getattr(SECTIONS[section](), name)
    return f"for example {key}={str(default).lower() if isinstance(default, bool) else default}"


def unknown(what: str, name: str, known: Iterable[str], *, prefix: str = "") -> UserError:
    """The error for a name that is none of `known`, with the nearest one as its hint."""
    names = sorted(known)
    hint = did_you_mean(name, names, prefix=prefix) or f"known: {', '.join(prefix + each for each in names)}"
    return UserError(f"unknown {what}", hint)


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """A hint with the nearest of `known`; empty where none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {prefix}{close[0]}?" if close else ""


def key_names(section: str) -> str:
    return ", ".join(typing.get_type_hints(SECTIONS[section]))


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def replace(config: RunConfig, section: str, **values: OptionValue) -> RunConfig:
    """`config` with some values of one section changed, checked like any other input."""
    body = config.to_dict()
    body[section] = {**body[section], **values}
    return RunConfig.from_dict(body)
