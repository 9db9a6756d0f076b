"""A trainer of a few lines with the interface of the project's own: no packing, the whole vocabulary at once, AdamW."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.bench.agreement import routes_noted
from stages.bench.update_step import Trainer
from stages.config import UpdateConfig
from stages.model.policy import Policy


class Sample(NamedTuple):
    completion_id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    engine_logprobs: tuple[float, ...]
    advantage: float
    routes: Any = None


class Pack(NamedTuple):
    samples: list[Sample]


class TokenLogprobs(NamedTuple):
    logprobs: Tensor
    entropy: Tensor


class Inputs(NamedTuple):
    old_logprobs: Tensor
    engine_logprobs: Tensor
    reference_logprobs: Tensor | None
    advantages: Tensor
    lengths: Tensor


class Totals(NamedTuple):
    num_completions: int
    num_tokens: int
    max_new_tokens: int


def pack(samples: Sequence[Sample], pack_tokens: int) -> list[Pack]:
    """Completions one after the other, a new pack when one is full."""
    packs: list[Pack] = []
    room = 0
    for sample in samples:
        room -= len(sample.completion_ids)
        if room < 0:
            packs.append(Pack([]))
            room = pack_tokens - len(sample.prompt_ids) - len(sample.completion_ids)
        packs[-1].samples.append(sample)
    return packs


class Store:
    def __init__(self, device: torch.device) -> None:
        pass

    def close(self) -> None:
        pass


def completion_logprobs(
    policy: Policy,
    pack: Pack,
    *,
    temperature: float,
    store: Store,
    replay_routes: bool = False,
    routes: list[Tensor] | None = None,
) -> TokenLogprobs:
    found = []
    for sample in pack.samples:
        ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids[:-1]]], device=policy.device)
        positions = torch.arange(ids.shape[1], device=policy.device)[None]
        with routes_noted(policy.model) as noted:
            hidden = policy.model.model(
                inputs_embeds=policy.embed(ids), position_ids=positions, use_cache=False
            ).last_hidden_state
        if routes is not None:
            routes += [layer[0] for layer in noted]
        logits = policy.model.lm_head(hidden[0, len(sample.prompt_ids) - 1 :]).float() / temperature
        targets = torch.tensor(sample.completion_ids, device=policy.device)
        found.append(logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    logprobs = torch.cat(found)
    return TokenLogprobs(logprobs, torch.zeros_like(logprobs))


def make_optimizer(policy: Policy, update: UpdateConfig) -> torch.optim.Optimizer:
    parameters = [parameter.requires_grad_(True) for _, parameter in policy.parameters()]
    return torch.optim.AdamW(parameters, lr=update.learning_rate, weight_decay=0.0)


def policy_loss(logprobs: Tensor, inputs: Inputs, totals: Totals, update: UpdateConfig) -> tuple[Tensor, None]:
    advantages = torch.repeat_interleave(inputs.advantages, inputs.lengths)
    return -(torch.exp(logprobs - inputs.old_logprobs) * advantages).sum() / totals.num_tokens, None


def config(*, optimizer: str, **values: Any) -> UpdateConfig:
    return UpdateConfig(**values)


def stand_in_trainer() -> Trainer:
    return Trainer(Sample, pack, completion_logprobs, Store, make_optimizer, policy_loss, Inputs, Totals, config)
