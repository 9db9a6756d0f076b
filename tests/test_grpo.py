"""GRPO against numbers worked out by hand, and its gradient against the plain policy gradient."""

import math

import pytest
import torch

from stages.grpo import LossMetrics, advantages, grpo_loss, kl_to_reference, learning_rate_at


def test_advantages_are_standard_scores_within_each_group() -> None:
    # mean 2, sample standard deviation sqrt(((1)^2 + 0 + 1^2) / 2) = 1
    rewards = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [0.0, 0.0, 6.0]])
    # third group: mean 2, deviations -2 -2 4, variance 24 / 2 = 12
    root = 12**0.5
    expected = torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [-2 / root, -2 / root, 4 / root]])
    torch.testing.assert_close(advantages(rewards), expected)


def test_a_group_of_rewards_alike_but_for_rounding_carries_no_signal() -> None:
    assert advantages(torch.tensor([[0.1 + 0.2, 0.3, 0.3]], dtype=torch.float64)).abs().max() == 0


def test_groups_of_one_are_refused() -> None:
    with pytest.raises(ValueError, match="G of 2 or more"):
        advantages(torch.ones(4, 1))


def hand_loss(kl: float = 0.0, reference: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, LossMetrics]:
    """Two ragged completions with ratios below, within and above the clip, for both signs of the advantage."""
    ratios = torch.tensor([[1.5, 0.5, 1.1], [1.5, 0.5, 9.9]])
    old = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -0.7, -3.0]])
    policy = (old + ratios.log()).requires_grad_()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    loss, metrics = grpo_loss(
        policy,
        old_logprobs=old,
        advantages=torch.tensor([2.0, -1.0]),
        loss_mask=mask,
        num_completions=2,
        clip=0.2,
        kl=kl,
        reference_logprobs=reference,
    )
    loss.backward()
    assert policy.grad is not None
    return loss, policy.grad, metrics


def test_the_clipped_loss_and_its_gradient_are_those_worked_out_by_hand() -> None:
    loss, gradient, metrics = hand_loss()
    # advantage 2: min(1.5, 1.2) * 2 = 2.4; min(0.5, 0.8) * 2 = 1.0; 1.1 * 2 = 2.2 -> mean 5.6 / 3
    # advantage -1: min(-1.5, -1.2) = -1.5; min(-0.5, -0.8) = -0.8 -> mean -2.3 / 2
    assert loss.item() == pytest.approx(-(5.6 / 3 - 2.3 / 2) / 2, rel=1e-6)
    # d loss / d logprob = -ratio * advantage / length / completions where the clip did not cut, else 0
    expected = torch.tensor([[0.0, -0.5 * 2 / 6, -1.1 * 2 / 6], [1.5 / 4, 0.0, 0.0]])
    torch.testing.assert_close(gradient, expected)
    means = metrics.means()
    assert means["clip_fraction"] == pytest.approx(2 / 5)
    assert means["ratio_mean"] == pytest.approx((1.5 + 0.5 + 1.1 + 1.5 + 0.5) / 5, rel=1e-6)
    assert (means["ratio_min"], means["ratio_max"]) == pytest.approx((0.5, 1.5), rel=1e-6)
    assert metrics.tokens == 5


def test_the_kl_term_is_k3_per_token_with_its_weight() -> None:
    reference = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -0.7, 5.0]])
    plain, _, _ = hand_loss()
    loss, gradient, metrics = hand_loss(kl=0.1, reference=reference)

    def k3(ratio: float) -> float:
        # reference equals old here, so reference - policy = -log(ratio)
        return 1 / ratio + math.log(ratio) - 1

    per_completion = [(k3(1.5) + k3(0.5) + k3(1.1)) / 3, (k3(1.5) + k3(0.5)) / 2]
    assert loss.item() - plain.item() == pytest.approx(0.1 * sum(per_completion) / 2, rel=1e-5)
    assert metrics.means()["kl"] == pytest.approx((2 * k3(1.5) + 2 * k3(0.5) + k3(1.1)) / 5, rel=1e-5)
    # d k3 / d policy = 1 - exp(reference - policy) = 1 - 1 / ratio
    assert gradient[0, 0].item() == pytest.approx(0.1 * (1 - 1 / 1.5) / 3 / 2, rel=1e-5)
    assert gradient[1, 2] == 0  # off the completion, whatever the reference says there


def test_k3_is_never_negative_and_unbiased() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(5).log_softmax(0), torch.randn(5).log_softmax(0)
    estimates = kl_to_reference(p, q)
    assert (estimates >= 0).all()
    assert (p.exp() * estimates).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-5)


def test_on_policy_the_ratio_is_one_and_the_gradient_the_plain_policy_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(7, (3, 4, 1))
    advantage = torch.tensor([1.0, -0.3, 0.0], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    logprobs = logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)
    loss, metrics = grpo_loss(
        logprobs, old_logprobs=logprobs.detach(), advantages=advantage, loss_mask=mask, num_completions=3, clip=0.2
    )
    (ours,) = torch.autograd.grad(loss, logits, retain_graph=True)
    plain = -(advantage * (logprobs * mask).sum(-1) / mask.sum(-1)).mean()
    (expected,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(ours, expected)
    means = metrics.means()
    assert means["ratio_min"] == means["ratio_max"] == means["ratio_mean"] == 1.0
    assert means["clip_fraction"] == means["ratio_std"] == 0.0


def test_micro_batches_add_up_to_the_batch() -> None:
    torch.manual_seed(1)
    old, policy = -torch.rand(4, 6), -torch.rand(4, 6)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4], [1]])
    advantage = torch.randn(4)

    def part(rows: slice) -> tuple[torch.Tensor, LossMetrics]:
        arguments = {"old_logprobs": old[rows], "advantages": advantage[rows], "loss_mask": mask[rows]}
        return grpo_loss(policy[rows], **arguments, num_completions=4, clip=0.2)

    whole, whole_metrics = part(slice(None))
    first, first_metrics = part(slice(0, 3))
    second, second_metrics = part(slice(3, 4))
    torch.testing.assert_close(first + second, whole)
    assert (first_metrics + second_metrics).means() == pytest.approx(whole_metrics.means())


def test_a_kl_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="needs reference_logprobs"):
        grpo_loss(
            torch.zeros(1, 1),
            old_logprobs=torch.zeros(1, 1),
            advantages=torch.ones(1),
            loss_mask=torch.ones(1, 1, dtype=torch.bool),
            num_completions=1,
            clip=0.2,
            kl=0.1,
        )


def test_the_learning_rate_warms_up_then_falls_linearly_to_zero_at_its_own_length() -> None:
    rates = [learning_rate_at(step, peak=1.0, warmup_steps=2, schedule_steps=6) for step in range(8)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    assert learning_rate_at(10**6, peak=1.0, warmup_steps=2, schedule_steps=0) == 1.0
