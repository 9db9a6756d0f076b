"""Complete configurations by name: what `flexsink train NAME` starts from."""

from collections.abc import Callable

from stages.config import (
    EvaluateConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    SandboxConfig,
    TrainConfig,
    UpdateConfig,
    unknown,
)


def tiny() -> RunConfig:
    """The bundled model learns 2048 on two CPU cores, in minutes."""
    return RunConfig(
        preset="tiny",
        train=TrainConfig(iterations=20),
        model=ModelConfig(source="data/tiny", experts="dequantized"),
        rollout=RolloutConfig(prompts=6, group_size=8, max_new_tokens=256, max_slots=48),
        # The gradient is cut to its usual norm: a rare bad token's is ten times as large. Without the decay and the KL,
        # drift costs syntax errors in the end.
        update=UpdateConfig(
            learning_rate=5e-3, schedule_steps=64, steps=2, kl=0.02, max_grad_norm=0.02, lora_rank=8, lora_alpha=16.0
        ),
        evaluate=EvaluateConfig(programs=64, games=4),
        sandbox=SandboxConfig(cpu_s=2.0),
    )


def tiny_test() -> RunConfig:
    """The whole loop in seconds, for tests of kill and resume: 2 iterations of 2 x 8 completions."""
    return RunConfig(
        preset="tiny_test",
        train=TrainConfig(iterations=2),
        model=ModelConfig(source="data/tiny", experts="dequantized"),
        rollout=RolloutConfig(prompts=2, group_size=8, max_new_tokens=160, max_slots=16),
        update=UpdateConfig(learning_rate=5e-3, steps=2, lora_rank=4, lora_alpha=8.0),
        evaluate=EvaluateConfig(programs=8, games=2),
    )


# The large presets follow what has been published for GRPO on gpt-oss-20b: LoRA on all linear layers with alpha 2r,
# rate 5e-5, weight decay 0.001, warm-up 10 %, temperature 1. Groups of 8, not 2, of which 45 % carried no signal.
def gpt_oss_20b() -> RunConfig:
    """gpt-oss-20b on one card of 24 GB or more."""
    return RunConfig(
        preset="gpt_oss_20b",
        train=TrainConfig(iterations=100),
        model=ModelConfig(source="openai/gpt-oss-20b", dtype="bfloat16"),
        rollout=RolloutConfig(prompts=8, group_size=8, max_new_tokens=768, max_slots=64),
        update=UpdateConfig(
            learning_rate=5e-5,
            schedule_steps=200,
            warmup_steps=20,
            steps=2,
            pack_tokens=8192,
            weight_decay=0.001,
            lora_rank=16,
            lora_alpha=32.0,
        ),
        evaluate=EvaluateConfig(every=25, programs=64, games=4),
        sandbox=SandboxConfig(containers=4),
    )


def gpt_oss_20b_16gb() -> RunConfig:
    """gpt-oss-20b on one card of 16 GB: attention in NF4, the embedding in CPU memory, fewer slots."""
    return RunConfig(
        preset="gpt_oss_20b_16gb",
        train=TrainConfig(iterations=100),
        model=ModelConfig(source="openai/gpt-oss-20b", dtype="bfloat16", dense="nf4", offload_embedding=True),
        rollout=RolloutConfig(prompts=4, group_size=8, max_new_tokens=768, max_slots=16),
        update=UpdateConfig(
            learning_rate=5e-5,
            schedule_steps=200,
            warmup_steps=20,
            steps=2,
            pack_tokens=2048,
            optimizer="adamw_8bit",
            lora_dtype="bfloat16",
            weight_decay=0.001,
            lora_rank=8,
            lora_alpha=16.0,
        ),
        evaluate=EvaluateConfig(every=25, programs=64, games=4),
        sandbox=SandboxConfig(containers=4),
    )


def gpt_oss_120b() -> RunConfig:
    """gpt-oss-120b on one card of 80 GB or more."""
    return RunConfig(
        preset="gpt_oss_120b",
        train=TrainConfig(iterations=100),
        model=ModelConfig(source="openai/gpt-oss-120b", dtype="bfloat16", dense="nf4", offload_embedding=True),
        rollout=RolloutConfig(prompts=8, group_size=8, max_new_tokens=768, max_slots=32),
        update=UpdateConfig(
            learning_rate=5e-5,
            schedule_steps=200,
            warmup_steps=20,
            steps=2,
            pack_tokens=2048,
            optimizer="adamw_8bit",
            lora_dtype="bfloat16",
            weight_decay=0.001,
            lora_rank=16,
            lora_alpha=32.0,
        ),
        evaluate=EvaluateConfig(every=25, programs=64, games=4),
        sandbox=SandboxConfig(containers=4),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "tiny_test": tiny_test,
    "gpt_oss_20b": gpt_oss_20b,
    "gpt_oss_20b_16gb": gpt_oss_20b_16gb,
    "gpt_oss_120b": gpt_oss_120b,
}


def preset(name: str) -> RunConfig:
    """The preset of that name; UserError with the nearest name."""
    if name not in PRESETS:
        raise unknown(f"preset {name!r}", name, PRESETS)
    return PRESETS[name]()
