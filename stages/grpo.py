"""Group-relative policy optimisation: advantages, the clipped loss, the KL to a reference. Tensors in, loss and metrics
out.

Source: Shao et al. 2024, "DeepSeekMath" (GRPO); the clipped ratio is PPO's (Schulman et al. 2017); the KL estimator is
k3 of Schulman 2020, "Approximating KL Divergence". Shapes: P prompts, G completions of each, N completions of a batch,
T tokens. Log-probabilities are natural logs. What is averaged over what: tokens within a completion, then completions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

STD_FLOOR = 1e-4  # groups whose rewards spread less than this carry no signal; dividing by it would amplify rounding


def advantages(rewards_P_G: Tensor) -> Tensor:
    """How much better than its group each completion did, in standard deviations: [P, G].

    A group whose rewards are all alike has no signal: its advantages are 0. The standard deviation is the sample's (n -
    1). Raises ValueError on groups of one, which cannot be compared with anything.
    """
    if rewards_P_G.dim() != 2 or rewards_P_G.shape[1] < 2:
        raise ValueError(f"advantages need rewards [P, G] with G of 2 or more, got {tuple(rewards_P_G.shape)}")
    centred = rewards_P_G - rewards_P_G.mean(-1, keepdim=True)
    std = rewards_P_G.std(-1, keepdim=True)
    return torch.where(std > STD_FLOOR, centred / std.clamp(min=STD_FLOOR), torch.zeros_like(centred))


def kl_to_reference(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """k3 estimate of KL(policy || reference) a token: exp(d) - d - 1 with d = reference - policy; never negative."""
    difference = reference_logprobs - policy_logprobs
    return torch.expm1(difference) - difference


@dataclass
class LossMetrics:
    """Sums over a batch's completions and tokens, so that micro-batches add up; `means` turns them into figures."""

    completions: int = 0
    tokens: int = 0
    loss: float = 0.0
    kl: float = 0.0  # to the reference, 0 without one
    clipped: int = 0  # tokens whose gradient the clip cut off
    ratio: float = 0.0
    ratio_square: float = 0.0
    ratio_min: float = float("inf")
    ratio_max: float = float("-inf")

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
        )

    def means(self) -> dict[str, float]:
        """loss, kl, clip_fraction and ratio_{mean,std,min,max}; ratios are those before any clipping."""
        tokens = max(self.tokens, 1)
        mean = self.ratio / tokens if self.tokens else 1.0
        return {
            "loss": self.loss,
            "kl": self.kl / tokens,
            "clip_fraction": self.clipped / tokens,
            "ratio_mean": mean,
            "ratio_std": max(self.ratio_square / tokens - mean * mean, 0.0) ** 0.5 if self.tokens else 0.0,
            "ratio_min": self.ratio_min if self.tokens else 1.0,
            "ratio_max": self.ratio_max if self.tokens else 1.0,
        }


def grpo_loss(
    policy_logprobs: Tensor,
    *,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    num_completions: int,
    clip: float,
    kl: float = 0.0,
    reference_logprobs: Tensor | None = None,
) -> tuple[Tensor, LossMetrics]:
    """The clipped GRPO loss of a batch (a scalar whose gradient is wanted) and its metrics.

    policy_logprobs [N, T] with gradient; old_logprobs [N, T] of the same tokens before this iteration's first step;
    advantages [N]; loss_mask bool [N, T], False off the completion; num_completions: of the whole optimizer step, so
    that the losses of its micro-batches add up to its loss. The ratio is clipped to [1 - clip, 1 + clip],
    pessimistically. `kl` weighs the k3 KL to reference_logprobs [N, T]. Raises ValueError when kl is asked for without
    a reference.
    """
    if kl and reference_logprobs is None:
        raise ValueError(f"a KL weight of {kl} needs reference_logprobs")
    mask = loss_mask.to(policy_logprobs.dtype)
    ratio = torch.exp((policy_logprobs - old_logprobs) * mask)
    advantage = advantages[:, None]
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantage
    token_loss = -torch.minimum(unclipped, clipped)
    token_kl = torch.zeros_like(token_loss)
    if reference_logprobs is not None:
        token_kl = kl_to_reference(policy_logprobs * mask, reference_logprobs * mask)
        token_loss = token_loss + kl * token_kl
    lengths = mask.sum(-1).clamp(min=1)
    loss = ((token_loss * mask).sum(-1) / lengths).sum() / num_completions
    with torch.no_grad():
        kept = ratio[loss_mask]
        metrics = LossMetrics(
            completions=len(advantages),
            tokens=int(loss_mask.sum()),
            loss=float(loss),
            kl=float(token_kl[loss_mask].sum()),
            clipped=int(((clipped < unclipped) & loss_mask).sum()),
            ratio=float(kept.double().sum()),
            ratio_square=float(kept.double().square().sum()),
            ratio_min=float(kept.min()) if kept.numel() else float("inf"),
            ratio_max=float(kept.max()) if kept.numel() else float("-inf"),
        )
    return loss, metrics


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
