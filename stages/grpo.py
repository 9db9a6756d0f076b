"""Group-relative policy optimisation on one page: advantages, losses, importance correction, KL. Tensors in, loss and
metrics out.

A loss is a row of LOSSES: what a token loses, what it counts for, and settings of its own.

| loss    | a token's loss                                    | mean over                | source                    |
|---------|---------------------------------------------------|--------------------------|---------------------------|
| grpo    | PPO's clipped ratio (Schulman et al. 2017)        | tokens, then completions | Shao et al. 2024          |
| bnpo    | the same                                          | tokens of the step       | TRL's loss of that name   |
| dr_grpo | the same; advantages are not divided              | completions x max tokens | Liu et al. 2025, Dr. GRPO |
| dapo    | the same, clipped higher above; groups without    | tokens of the step       | Yu et al. 2025, DAPO      |
|         | signal leave the step, and nothing replaces them  |                          |                           |
| gspo    | PPO's clip on the completion's own ratio          | tokens, then completions | Zheng et al. 2025, GSPO   |
| cispo   | -log p, weighted by the clipped ratio, a constant | tokens of the step       | MiniMax 2025, MiniMax-M1  |
| sapo    | a sigmoid gate of the ratio instead of a clip     | tokens, then completions | Gao et al. 2025, SAPO     |

DAPO as published samples fresh prompts until a step is full of groups with a signal; here an iteration's rollout is
what it is, so such a step is smaller, and so is what it is divided by. Its penalty for overlong answers is
`overlong_penalty`, and may go with any loss.

Shapes: P prompts, G completions of each; N completions of a micro-batch with `lengths` [N] tokens each, T tokens in
all, one completion after the other, no padding. Log-probabilities are natural logs. Whatever a loss is averaged over is
counted over the whole optimizer step (StepTotals): the losses of its micro-batches add up to its own, and so do their
gradients. On policy (ratio 1, correction none) every loss has the gradient of the plain policy gradient, averaged its
own way; all but cispo also have its value there, -advantage a token (sapo up to a constant factor, 2 / temperature).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from stages.config import UpdateConfig

STD_FLOOR = 1e-4  # groups whose rewards spread less than this carry no signal; dividing by it would amplify rounding
SAPO_TEMPERATURES = (1.0, 1.05)  # of positive and of negative advantages, as published: the negative ones fade sooner


def signal(rewards_P_G: Tensor) -> Tensor:
    """Which groups' rewards differ, so that something can be learned from them: bool [P]."""
    return rewards_P_G.std(-1) > STD_FLOOR


def advantages(rewards_P_G: Tensor, *, scale: str = "group") -> Tensor:
    """How much better than its group each completion did: [P, G].

    scale: what the difference to the group's mean is divided by. "group": the group's standard deviation (Shao et al.
    2024); "batch": that of all rewards given (Liu et al. 2025, "Tricks or Traps?"), so that a group whose rewards
    hardly differ weighs little; "none": nothing (Liu et al. 2025, Dr. GRPO). Standard deviations are the sample's (n -
    1). A group whose rewards are all alike has no signal: its advantages are 0. Raises ValueError on groups of one,
    which cannot be compared with anything.
    """
    if rewards_P_G.dim() != 2 or rewards_P_G.shape[1] < 2:
        raise ValueError(f"advantages need rewards [P, G] with G of 2 or more, got {tuple(rewards_P_G.shape)}")
    centred = rewards_P_G - rewards_P_G.mean(-1, keepdim=True)
    if scale == "group":
        centred = centred / rewards_P_G.std(-1, keepdim=True).clamp(min=STD_FLOOR)
    elif scale == "batch":
        centred = centred / rewards_P_G.std().clamp(min=STD_FLOOR)
    elif scale != "none":
        raise ValueError(f"advantages are scaled by group, batch or none, not by {scale!r}")
    return torch.where(signal(rewards_P_G)[:, None], centred, torch.zeros_like(centred))


def overlong_penalty(num_tokens: Tensor, *, max_new_tokens: int, overlong_tokens: int) -> Tensor:
    """What is added to the reward of completions of `num_tokens` tokens, any shape: 0 up to max_new_tokens -
    overlong_tokens, from there falling linearly to -1 at max_new_tokens; 0 where overlong_tokens is 0.

    Source: Yu et al. 2025, DAPO, "soft overlong punishment".
    """
    if overlong_tokens == 0:
        return torch.zeros(num_tokens.shape, dtype=torch.float64)
    excess = num_tokens.double() - (max_new_tokens - overlong_tokens)
    return -(excess / overlong_tokens).clamp(0, 1)


def kl_to_reference(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """k3 estimate of KL(policy || reference) a token: exp(d) - d - 1 with d = reference - policy; never negative.

    Source: Schulman 2020, "Approximating KL Divergence".
    """
    difference = reference_logprobs - policy_logprobs
    return torch.expm1(difference) - difference


class LossInputs(NamedTuple):
    """What a micro-batch's loss is made of, beside the policy's log-probabilities."""

    old_logprobs: Tensor  # [T], the trainer's before the iteration's first step
    engine_logprobs: Tensor  # [T], the engine's when it sampled
    reference_logprobs: Tensor | None  # [T], the trainer's without the adapter; None: not measured
    advantages: Tensor  # [N]
    lengths: Tensor  # int64 [N]


class StepTotals(NamedTuple):
    """Counts of a whole optimizer step, all its micro-batches together; without what takes no part in its loss."""

    num_completions: int
    num_tokens: int
    max_new_tokens: int  # a completion's limit


class TokenLosses(NamedTuple):
    """A surrogate's answer, [T] each."""

    losses: Tensor
    clipped: Tensor  # bool: whose gradient the clip cut off, or for cispo whose weight it cut


def clipped_ratio(policy_logprobs: Tensor, inputs: LossInputs, clip_low: float, clip_high: float) -> TokenLosses:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), pessimistic, with r = policy / old probability of the token.

    Source: Schulman et al. 2017, PPO; bounds that differ ("clip-higher"): Yu et al. 2025, DAPO.
    """
    return pessimistic(torch.exp(policy_logprobs - inputs.old_logprobs), inputs, clip_low, clip_high)


def sequence_ratio(policy_logprobs: Tensor, inputs: LossInputs, clip_low: float, clip_high: float) -> TokenLosses:
    """`clipped_ratio` with one ratio for all tokens of a completion: the geometric mean of theirs.

    It is written as stop(s) * policy / stop(policy), which has the value and the gradient of s once a completion's
    tokens are averaged, and lets the correction weigh token by token. Source: Zheng et al. 2025, GSPO (GSPO-token).
    """
    log_ratio = (policy_logprobs - inputs.old_logprobs).detach()
    mean = torch.segment_reduce(log_ratio, "sum", lengths=inputs.lengths) / inputs.lengths
    own = policy_logprobs - policy_logprobs.detach()  # 0, with a gradient
    return pessimistic(torch.exp(to_tokens(mean, inputs, policy_logprobs) + own), inputs, clip_low, clip_high)


def pessimistic(ratio: Tensor, inputs: LossInputs, clip_low: float, clip_high: float) -> TokenLosses:
    advantage = to_tokens(inputs.advantages, inputs, ratio)
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    return TokenLosses(-torch.minimum(unclipped, clipped), clipped < unclipped)


def clipped_weight(policy_logprobs: Tensor, inputs: LossInputs, clip_low: float, clip_high: float) -> TokenLosses:
    """-stop(clip(r, 1 - clip_low, 1 + clip_high)) A log p: the clip bounds a token's weight and never drops the token.

    The value is of no use by itself, it shifts with log p. Source: MiniMax 2025, MiniMax-M1 (CISPO).
    """
    ratio = torch.exp(policy_logprobs - inputs.old_logprobs).detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return TokenLosses(-weight * to_tokens(inputs.advantages, inputs, ratio) * policy_logprobs, weight != ratio)


def soft_gate(policy_logprobs: Tensor, inputs: LossInputs, clip_low: float, clip_high: float) -> TokenLosses:
    """-(4 / t) sigmoid(t (r - 1)) A, with temperature t by the sign of A; it has no clip, both bounds are ignored.

    A token's gradient is weighed by r * 4 p (1 - p), p the sigmoid: 1 on policy, fading smoothly off it. Source: Gao et
    al. 2025, SAPO.
    """
    ratio = torch.exp(policy_logprobs - inputs.old_logprobs)
    advantage = to_tokens(inputs.advantages, inputs, ratio)
    positive, negative = SAPO_TEMPERATURES
    temperature = torch.full_like(advantage, negative).masked_fill(advantage > 0, positive)
    gate = 4 / temperature * torch.sigmoid(temperature * (ratio - 1))
    return TokenLosses(-gate * advantage, torch.zeros_like(ratio, dtype=torch.bool))


def completion_mean(lengths: Tensor, totals: StepTotals) -> Tensor:
    """What a token counts for, by completion [N]: completions alike, and a completion's tokens alike."""
    return torch.full_like(lengths, 1 / totals.num_completions) / lengths


def token_mean(lengths: Tensor, totals: StepTotals) -> Tensor:
    """What a token counts for, by completion [N]: all tokens of the step alike."""
    return torch.full_like(lengths, 1 / totals.num_tokens)


def fixed_mean(lengths: Tensor, totals: StepTotals) -> Tensor:
    """What a token counts for, by completion [N]: all alike, and the same however long answers get."""
    return torch.full_like(lengths, 1 / (totals.num_completions * totals.max_new_tokens))


class Loss(NamedTuple):
    """A row of LOSSES. The clips and the scale hold where the configuration leaves the choice to the loss."""

    token_losses: Callable[[Tensor, LossInputs, float, float], TokenLosses]
    token_share: Callable[[Tensor, StepTotals], Tensor]
    clip_low: float = 0.2
    clip_high: float | None = None  # None: as below
    scale: str = "group"
    drops_silent_groups: bool = False


LOSSES = {
    "grpo": Loss(clipped_ratio, completion_mean),
    "bnpo": Loss(clipped_ratio, token_mean),
    "dr_grpo": Loss(clipped_ratio, fixed_mean, scale="none"),
    "dapo": Loss(clipped_ratio, token_mean, clip_high=0.28, drops_silent_groups=True),
    # A mean of log ratios moves far less than one of them: bounds of the paper's section 5.1.
    "gspo": Loss(sequence_ratio, completion_mean, clip_low=3e-4, clip_high=4e-4),
    # No bound below, as published; the one above is left open there, 4 to 8 are in use.
    "cispo": Loss(clipped_weight, token_mean, clip_low=1.0, clip_high=4.0),
    "sapo": Loss(soft_gate, completion_mean),
}


class Clip(NamedTuple):
    low: float
    high: float


def clip_of(update: UpdateConfig) -> Clip:
    """How far below and above 1 the ratio may go: the configuration's, and where that has 0 the loss's own."""
    own = LOSSES[update.loss]
    low = update.clip or own.clip_low
    return Clip(low, update.clip_high or (low if own.clip_high is None else own.clip_high))


def scale_of(update: UpdateConfig) -> str:
    """What `advantages` divides by: the configuration's choice, the loss's own where that is auto."""
    return LOSSES[update.loss].scale if update.scale_rewards == "auto" else update.scale_rewards


class Correction(NamedTuple):
    weights: Tensor  # [T], constants that a token's loss is multiplied by
    corrected: Tensor  # bool [T]: truncated or masked


def correction(old_logprobs: Tensor, engine_logprobs: Tensor, *, kind: str, cap: float) -> Correction | None:
    """Weights r = trainer / engine probability: tokens were sampled by one and are learned from by the other.

    "truncated": min(r, cap) (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training"). "masked": r within [1 / cap, cap], 0 outside (IcePop, Ling team 2025); what a loss is averaged over
    stays the same. "none": None. The KL to the reference is not weighed.
    """
    if kind == "none":
        return None
    ratio = torch.exp(old_logprobs - engine_logprobs).detach()
    if kind == "truncated":
        return Correction(ratio.clamp(max=cap), ratio > cap)
    if kind == "masked":
        outside = (ratio < 1 / cap) | (ratio > cap)
        return Correction(torch.where(outside, torch.zeros_like(ratio), ratio), outside)
    raise ValueError(f"the correction is none, truncated or masked, not {kind!r}")


def policy_loss(
    policy_logprobs: Tensor, inputs: LossInputs, totals: StepTotals, update: UpdateConfig
) -> tuple[Tensor, "Unread[LossMetrics]"]:
    """The loss of a micro-batch by `update.loss` (a scalar whose gradient is wanted) and its metrics.

    policy_logprobs [T] with a graph. Read of `update`: loss, clip, clip_high, kl, correction, correction_cap; `kl`
    weighs the k3 KL to the reference, averaged as the loss is. Raises ValueError when kl is asked for without a
    reference.
    """
    if update.kl and inputs.reference_logprobs is None:
        raise ValueError(f"a KL weight of {update.kl} needs reference_logprobs")
    loss_of, clip = LOSSES[update.loss], clip_of(update)
    losses, clipped = loss_of.token_losses(policy_logprobs, inputs, clip.low, clip.high)
    corrected = correction(
        inputs.old_logprobs, inputs.engine_logprobs, kind=update.correction, cap=update.correction_cap
    )
    if corrected is not None:
        losses = losses * corrected.weights
    token_kl = torch.zeros_like(losses)
    if inputs.reference_logprobs is not None:
        token_kl = kl_to_reference(policy_logprobs, inputs.reference_logprobs)
        losses = losses + update.kl * token_kl
    share = loss_of.token_share(inputs.lengths.to(losses.dtype), totals)
    loss = (losses * to_tokens(share, inputs, losses)).sum()
    with torch.no_grad():
        ratio = torch.exp(policy_logprobs - inputs.old_logprobs).double()
        sums = [loss, token_kl.sum(), clipped.sum(), ratio.sum(), ratio.square().sum(), *extremes(ratio)]
        sums.append(corrected.corrected.sum() if corrected else torch.zeros_like(loss))
    return loss, Unread(LossMetrics, (len(inputs.lengths), len(ratio)), sums)


def to_tokens(values: Tensor, inputs: LossInputs, like: Tensor) -> Tensor:
    """What each completion has, [N], for each of its tokens, [T], in the dtype of `like` [T]."""
    return values.to(like.dtype).repeat_interleave(inputs.lengths, output_size=len(like))


def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest, infinity and minus infinity of nothing: both add up over micro-batches."""
    if not values.numel():
        return values.new_tensor(float("inf")), values.new_tensor(float("-inf"))
    return values.min(), values.max()


Figures = TypeVar("Figures")


class Unread(Generic[Figures]):
    """Figures whose sums lie on the device, where more may be asked of it meanwhile."""

    def __init__(self, kind: Callable[..., Figures], counts: tuple[int, ...], sums: Sequence[Tensor]) -> None:
        self._kind, self._counts = kind, counts
        self._sums = torch.stack([each.detach().double() for each in sums])

    def read(self) -> Figures:
        """Waits for the device, once for all of them."""
        return self._kind(*self._counts, *self._sums.tolist())


@dataclass
class LossMetrics:
    """Sums over a micro-batch's completions and tokens, which add up; `means` turns them into figures."""

    completions: int = 0
    tokens: int = 0
    loss: float = 0.0
    kl: float = 0.0  # to the reference, 0 without one
    clipped: float = 0.0  # tokens
    ratio: float = 0.0
    ratio_square: float = 0.0
    ratio_min: float = float("inf")
    ratio_max: float = float("-inf")
    corrected: float = 0.0  # tokens

    def __add__(self, other: "LossMetrics") -> "LossMetrics":
        return LossMetrics(
            completions=self.completions + other.completions,
            tokens=self.tokens + other.tokens,
            loss=self.loss + other.loss,
            kl=self.kl + other.kl,
            clipped=self.clipped + other.clipped,
            ratio=self.ratio + other.ratio,
            ratio_square=self.ratio_square + other.ratio_square,
            ratio_min=min(self.ratio_min, other.ratio_min),
            ratio_max=max(self.ratio_max, other.ratio_max),
            corrected=self.corrected + other.corrected,
        )

    def means(self) -> dict[str, float]:
        """loss, kl, clip_fraction, correction_fraction and ratio_{mean,std,min,max}; ratios are those of tokens, before
        any clipping."""
        tokens = max(self.tokens, 1)
        mean = self.ratio / tokens if self.tokens else 1.0
        return {
            "loss": self.loss,
            "kl": self.kl / tokens,
            "clip_fraction": self.clipped / tokens,
            "correction_fraction": self.corrected / tokens,
            "ratio_mean": mean,
            "ratio_std": max(self.ratio_square / tokens - mean * mean, 0.0) ** 0.5 if self.tokens else 0.0,
            "ratio_min": self.ratio_min if self.tokens else 1.0,
            "ratio_max": self.ratio_max if self.tokens else 1.0,
        }


@dataclass
class Agreement:
    """How far the engine's log-probabilities lie from the trainer's: sums over tokens, which add up."""

    tokens: int = 0
    difference: float = 0.0
    difference_max: float = 0.0
    k3: float = 0.0
    ratio: float = 0.0
    ratio_min: float = float("inf")
    ratio_max: float = float("-inf")

    @classmethod
    def of(cls, trainer_logprobs: Tensor, engine_logprobs: Tensor) -> "Unread[Agreement]":
        """Of the same tokens, [T] each, scored by the policy that sampled them."""
        difference = (trainer_logprobs - engine_logprobs).abs()
        ratio = torch.exp((trainer_logprobs - engine_logprobs).double())
        k3 = kl_to_reference(engine_logprobs, trainer_logprobs)
        sums = [difference.double().sum(), extremes(difference)[1], k3.double().sum(), ratio.sum(), *extremes(ratio)]
        return Unread(cls, (len(ratio),), sums)

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(
            tokens=self.tokens + other.tokens,
            difference=self.difference + other.difference,
            difference_max=max(self.difference_max, other.difference_max),
            k3=self.k3 + other.k3,
            ratio=self.ratio + other.ratio,
            ratio_min=min(self.ratio_min, other.ratio_min),
            ratio_max=max(self.ratio_max, other.ratio_max),
        )

    def means(self) -> dict[str, float]:
        """engine_difference_{mean,max} and engine_kl in nats, engine_ratio_{mean,min,max}: trainer over engine."""
        tokens = max(self.tokens, 1)
        return {
            "engine_difference_mean": self.difference / tokens,
            "engine_difference_max": self.difference_max,
            "engine_kl": self.k3 / tokens,
            "engine_ratio_mean": self.ratio / tokens,
            "engine_ratio_min": self.ratio_min,
            "engine_ratio_max": self.ratio_max,
        }


def learning_rate_at(step: int, *, peak: float, warmup_steps: int, schedule_steps: int) -> float:
    """The learning rate of optimizer step `step`, from 0: linear warm-up, then linear decay to zero at schedule_steps.

    schedule_steps 0 keeps it at its peak. The schedule's length is its own, not the run's, so that a run can be made
    longer without changing its past.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule_steps == 0:
        return peak
    remaining = (schedule_steps - step) / max(schedule_steps - warmup_steps, 1)
    return peak * min(max(remaining, 0.0), 1.0)
