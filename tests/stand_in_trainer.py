"""The project's trainer with a loss and an optimizer of a few lines."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.bench.update_step import Trainer
from stages.config import UpdateConfig
from stages.model.policy import Policy
from stages.trainer import LayerStore, Sample, completion_logprobs, deal_packs


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


def make_optimizer(policy: Policy, update: UpdateConfig) -> torch.optim.Optimizer:
    parameters = [parameter.requires_grad_(True) for _, parameter in policy.parameters()]
    return torch.optim.AdamW(parameters, lr=update.learning_rate, weight_decay=0.0)


def policy_loss(logprobs: Tensor, inputs: Inputs, totals: Totals, update: UpdateConfig) -> tuple[Tensor, None]:
    advantages = torch.repeat_interleave(inputs.advantages, inputs.lengths)
    return -(torch.exp(logprobs - inputs.old_logprobs) * advantages).sum() / totals.num_tokens, None


def config(*, optimizer: str, **values: Any) -> UpdateConfig:
    return UpdateConfig(**values)


def stand_in_trainer() -> Trainer:
    return Trainer(
        sample=Sample,
        pack=deal_packs,
        completion_logprobs=completion_logprobs,
        store=LayerStore,
        make_optimizer=make_optimizer,
        policy_loss=policy_loss,
        inputs=Inputs,
        totals=Totals,
        config=config,
    )
