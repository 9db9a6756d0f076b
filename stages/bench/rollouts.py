"""The engine at its real work: a replayed RL rollout with continuous refill, and prefill alone.

The rollout is that of an iteration: 64 prompts of about 200 tokens, 8 completions each. How long each completion gets
is drawn from a stated distribution and enforced by its own max_new_tokens, as random weights never stop by themselves.
"""

import dataclasses
import statistics
import time
from typing import Any, NamedTuple

import numpy as np

from stages.bench.memory import Memory, synchronize
from stages.engine import Engine, Request, SamplingParams
from stages.model.policy import Policy

Row = dict[str, Any]
SAMPLE_EVERY = 64  # steps between two looks at the memory


class Rollout(NamedTuple):
    """What is replayed; lengths are those of completions, a lognormal distribution clipped at both ends."""

    prompts: int = 64
    group_size: int = 8
    prompt_tokens: tuple[int, int] = (160, 240)  # uniform
    median_tokens: int = 400
    sigma: float = 0.8  # of the logarithm: 10 % exceed 1 100
    shortest: int = 16
    longest: int = 2048
    max_slots: int = 256


def draw_lengths(rollout: Rollout, *, seed: int) -> np.ndarray:
    """Completion lengths int64 [prompts * group_size]."""
    generator = np.random.default_rng(seed)
    drawn = generator.lognormal(np.log(rollout.median_tokens), rollout.sigma, rollout.prompts * rollout.group_size)
    return np.clip(drawn.round().astype(np.int64), rollout.shortest, rollout.longest)


def draw_prompts(num_prompts: int, tokens: tuple[int, int], *, vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    """Random prompts of random lengths."""
    generator = np.random.default_rng((seed, 1))
    lengths = generator.integers(tokens[0], tokens[1] + 1, num_prompts)
    return [tuple(generator.integers(0, vocabulary, length).tolist()) for length in lengths]


def rollout_requests(rollout: Rollout, *, vocabulary: int, seed: int) -> list[Request]:
    """The requests, those of a prompt together."""
    prompts = draw_prompts(rollout.prompts, rollout.prompt_tokens, vocabulary=vocabulary, seed=seed)
    lengths = draw_lengths(rollout, seed=seed).tolist()
    return [
        Request(
            completion_id=f"{number // rollout.group_size:03d}-{number % rollout.group_size:03d}",
            prompt_ids=prompts[number // rollout.group_size],
            sampling=SamplingParams(max_new_tokens=length, seed=seed + number),
        )
        for number, length in enumerate(lengths)
    ]


def replay(policy: Policy, *, memory: Memory, rollout: Rollout, seed: int = 0) -> Row:
    """tokens_per_s end to end: prefill, refill and, unless the name says otherwise, the capture of every graph."""
    requests = rollout_requests(rollout, vocabulary=policy.model.config.vocab_size, seed=seed)
    memory.reset()
    steps = []

    def on_step(sampled: int) -> None:
        steps.append(sampled)
        if len(steps) % SAMPLE_EVERY == 0:
            memory.sample()

    engine = Engine(policy, max_slots=rollout.max_slots, max_new_tokens=rollout.longest)
    synchronize(policy.device)
    started = time.perf_counter()
    completions = engine.run(requests, on_step=on_step)
    synchronize(policy.device)
    seconds = time.perf_counter() - started
    figures, stats = memory.row(), engine.stats
    engine.close()
    generated = [len(completion.completion_ids) for completion in completions]
    wanted = [request.sampling.max_new_tokens for request in requests]
    assert generated == wanted, "a completion has another length than was asked for"
    capture = stats.capture_s if stats else 0.0
    return {
        "tokens_per_s": sum(generated) / seconds,
        "tokens_per_s_without_capture": sum(generated) / (seconds - capture),
        "wall_s": seconds,
        "capture_s": capture,
        "tokens": sum(generated),
        "prompt_tokens": sum(len(ids) for ids in dict.fromkeys(request.prompt_ids for request in requests)),
        "steps": len(steps),
        "lengths": {"mean": statistics.mean(generated), "median": statistics.median(generated), "max": max(generated)},
        "engine": dataclasses.asdict(stats) if stats else {},
        "rollout": {"distribution": "lognormal", **rollout._asdict()},
        **figures,
    }


def prefill(
    policy: Policy, *, memory: Memory, prompts: int = 64, tokens: int = 512, repeats: int = 5, seed: int = 0
) -> Row:
    """Prompt tokens a second of requests for one new token each: prefill, its cache writes, and one sampling."""
    vocabulary = policy.model.config.vocab_size
    memory.reset()
    engine = Engine(policy, max_slots=prompts, max_new_tokens=1)
    seconds = []
    for repeat in range(repeats + 1):  # the first compiles
        ids = draw_prompts(prompts, (tokens, tokens), vocabulary=vocabulary, seed=seed + repeat)
        sampling = SamplingParams(max_new_tokens=1)
        requests = [Request(completion_id=str(i), prompt_ids=p, sampling=sampling) for i, p in enumerate(ids)]
        synchronize(policy.device)
        started = time.perf_counter()
        engine.run(requests)
        synchronize(policy.device)
        seconds.append(time.perf_counter() - started)
    figures, stats = memory.row(), engine.stats
    engine.close()
    first, *warm = seconds
    return {
        "prompts": prompts,
        "tokens": tokens,
        "tokens_per_s": prompts * tokens / statistics.median(warm),
        "wall_s": statistics.median(warm),
        "first_s": first,
        "engine": dataclasses.asdict(stats) if stats else {},  # of the last repeat
        **figures,
    }
