"""A whole RL iteration on synthetic weights: the engine samples, a trivial reward judges, the trainer makes one
optimizer step on the very same policy. The engine gives its cache back before the update begins, as in a run.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from stages.bench.memory import Memory, synchronize
from stages.bench.update_cases import IterationCase
from stages.bench.update_step import Stopwatch, Training, requests, rewarded
from stages.engine import Engine
from stages.trainer import Pack, deal_packs
from stages.trainer.optimizer import moments_to_come

Row = dict[str, Any]
ENGINE_RESERVE_BYTES = 512 << 20  # of what the cap leaves, kept for prefill and graphs
PACK_TOKENS = 8192


def measure(
    training: Training,
    case: IterationCase,
    *,
    memory: Memory,
    cap_bytes: int | None = None,
    slots: int = 256,
    pack_tokens: int = PACK_TOKENS,
    seed: int = 0,
) -> Row:
    """Seconds of each part, the median of the repeats; peak bytes of all of them and the warm-up. strict_s is what
    scoring the completions again by the trainer's kernels would add.

    cap_bytes bounds the engine's cache too, which lies outside PyTorch's allocator. pack_tokens: of a micro-batch.
    """
    memory.reset()
    completions = case.prompts * case.group_size
    engine = Engine(
        training.policy,
        max_slots=min(completions, slots),
        max_new_tokens=case.new_tokens,
        cache_bytes=cache_budget(cap_bytes, training),
    )
    found: list[Row] = []
    packs: Sequence[Pack] = ()
    try:
        with memory.watched():
            for repeat in range(case.repeats + 1):
                packs = ()  # given up before the next are made
                row, packs = iterate(training, engine, case, pack_tokens=pack_tokens, seed=seed + repeat)
                found.append(row)
            held = memory.details()
    finally:
        engine.close()
    warm = found[1:] or found
    seconds = {name: statistics.median(each[name] for each in warm) for name in warm[0]}
    return seconds | {
        "completion_tokens": completions * case.new_tokens,
        "rollout_tokens_per_s": completions * case.new_tokens / seconds["rollout_s"],
        "warm": bool(found[1:]),
        "first": found[0],
        "packs": len(packs),
        "strict_s": rescore_s(training, packs),
        **held,
    }


def iterate(
    training: Training, engine: Engine, case: IterationCase, *, pack_tokens: int, seed: int
) -> tuple[Row, Sequence[Pack]]:
    """One iteration, in which the share of even tokens is rewarded: iteration_s and the seconds of its parts; and what
    it trained on.
    """
    device = training.policy.device
    started = time.perf_counter()
    asked = requests(
        training,
        prompts=case.prompts,
        group_size=case.group_size,
        prompt_tokens=(case.prompt_tokens, case.prompt_tokens),
        new_tokens=case.new_tokens,
        seed=seed,
    )
    completions = engine.run(asked)
    synchronize(device)
    sampled = time.perf_counter()
    rewards = [sum(token % 2 == 0 for token in each.completion_ids) / case.new_tokens for each in completions]
    samples = rewarded(completions, rewards, group_size=case.group_size)
    packs = deal_packs(samples, pack_tokens)
    judging = time.perf_counter()
    watch = Stopwatch(device)
    training.step(packs, watch, on_policy=False)
    parts = watch.milliseconds()
    ended = time.perf_counter()
    row = {
        "iteration_s": ended - started,
        "rollout_s": sampled - started,
        "capture_s": engine.stats.capture_s if engine.stats else 0.0,
        "reward_s": judging - sampled,
        "update_s": ended - judging,
        **{f"{name}_s": value / 1e3 for name, value in parts.items()},
    }
    return row, packs


def rescore_s(training: Training, packs: Sequence[Pack]) -> float:
    """Seconds that scoring the completions by the trainer's kernels takes: what `strict` costs an iteration."""
    device = training.policy.device
    synchronize(device)
    started = time.perf_counter()
    for pack in packs:
        training.logprobs(pack, grad=False)
    synchronize(device)
    return time.perf_counter() - started


def cache_budget(cap_bytes: int | None, training: Training) -> int:
    """Bytes that the engine's cache may take under the cap beside what is held now, the engine's copy of the adapter
    and moments that the first update will make; 0 is no limit of ours.
    """
    device = training.policy.device
    if cap_bytes is None or device.type != "cuda":
        return 0
    policy = training.policy
    copied = sum(policy.dtype.itemsize * parameter.numel() for _, parameter in policy.parameters())
    to_come = copied + moments_to_come(policy, training.update, training.optimizer)
    return max(1, cap_bytes - torch.cuda.memory_reserved(device) - to_come - ENGINE_RESERVE_BYTES)
