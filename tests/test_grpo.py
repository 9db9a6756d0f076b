"""Advantages, losses and corrections against numbers worked out by hand, in float64; and mutants of each formula, which
must fail those very checks.

A check takes the module that it checks, so that a mutant (the module's source with one text replaced) can be put in its
place.
"""

import dataclasses
import inspect
import math
import types
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from stages import grpo
from stages.config import UpdateConfig
from stages.grpo import Agreement, LossInputs, LossMetrics, StepTotals, learning_rate_at

LOSSES = get_args(get_type_hints(UpdateConfig)["loss"])

# A micro-batch of five ragged completions; ratios of the policy to the old policy, a line a completion.
LENGTHS = [3, 2, 1, 1, 1]
ADVANTAGES = [2.0, -1.0, 0.0, 1.0, -3.0]
RATIOS = [
    *(1.5, 0.5, 1.1),  # A > 0: above, below, within
    *(1.5, 0.5),  # A < 0: above, below
    1.7,  # of a group without signal
    1.25,  # A > 0: above 1.2, within 1.28
    1.21,  # A < 0: above
]
OLD = [-1.0, -2.0, -0.5, -1.5, -0.7, -3.0, -0.2, -1.1]
ENGINE_RATIOS = [1.0, 3.0, 0.25, 0.6, 1.9, 1.0, 0.45, 2.5]  # trainer over engine
REFERENCE = [-1.0, -2.0, -0.5, -1.5, -0.7, -3.0, -0.2, -1.4]  # as OLD but for the last
# The step has one completion of three tokens more, in another micro-batch.
TOTALS = StepTotals(num_completions=6, num_tokens=11, max_new_tokens=10)
COMPLETION = [1 / 6 / 3] * 3 + [1 / 6 / 2] * 2 + [1 / 6] * 3  # what a token counts for: mean of completions' means
TOKEN = [1 / 11] * 8
FIXED = [1 / (6 * 10)] * 8


class Expected(NamedTuple):
    """By token, before averaging: its loss, the derivative by its log-probability; how many tokens the clip cut."""

    losses: list[float]
    gradient: list[float]
    clipped: int
    share: list[float]
    settings: tuple[tuple[str, float], ...] = ()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gate(ratio: float, advantage: float, temperature: float) -> tuple[float, float]:
    p = sigmoid(temperature * (ratio - 1))
    return -advantage * 4 / temperature * p, -advantage * ratio * 4 * p * (1 - p)


# Clip 0.8 .. 1.2. A = 2: min(1.5, 1.2) 2 = 2.4, cut; min(0.5, 0.8) 2 = 1.0; 1.1 * 2 = 2.2. A = -1: min(-1.5, -1.2) =
# -1.5; min(-0.5, -0.8) = -0.8, cut. A = 0: 0. A = 1: min(1.25, 1.2), cut. A = -3: min(-3.63, -3.6) = -3.63.
# d(-r A) / d log p = -r A where nothing was cut.
CLIPPED = [-2.4, -1.0, -2.2, 1.5, 0.8, 0.0, -1.2, 3.63]
CLIPPED_GRADIENT = [0.0, -1.0, -2.2, 1.5, 0.0, 0.0, 0.0, 3.63]
# The completions' own ratios, geometric means: (1.5 * 0.5 * 1.1)^(1/3) = 0.938, (1.5 * 0.5)^(1/2) = 0.866, the rest as
# their one token's. Clip 0.9997 .. 1.0004: A = 2: 0.938 * 2; A = -1: min(-0.866, -0.9997), cut, both tokens; A = 1:
# min(1.25, 1.0004), cut; A = -3: min(-3.63, -3.0012).
S0 = (1.5 * 0.5 * 1.1) ** (1 / 3)
# Weights within 0.6 .. 1.3: 1.5 and 1.7 are cut to 1.3, 0.5 to 0.6.
WEIGHTED = [1.3 * 2, 0.6 * 2, 1.1 * 2, -1.3, -0.6, 0.0, 1.25, -1.21 * 3]
GATES = [gate(1.5, 2, 1.0), gate(0.5, 2, 1.0), gate(1.1, 2, 1.0), gate(1.5, -1, 1.05), gate(0.5, -1, 1.05), (0.0, 0.0)]
GATES += [gate(1.25, 1, 1.0), gate(1.21, -3, 1.05)]

EXPECTED = {
    "grpo": Expected(CLIPPED, CLIPPED_GRADIENT, 3, COMPLETION),
    "bnpo": Expected(CLIPPED, CLIPPED_GRADIENT, 3, TOKEN),
    "dr_grpo": Expected(CLIPPED, CLIPPED_GRADIENT, 3, FIXED),
    # above, the clip is at 1.28: the first token loses 2.56, and the seventh is within
    "dapo": Expected(
        [-2.56, -1.0, -2.2, 1.5, 0.8, 0.0, -1.25, 3.63], [0, -1.0, -2.2, 1.5, 0, 0, -1.25, 3.63], 2, TOKEN
    ),
    # d s / d log p is s / length: averaged over the completion's tokens, each has a whole s
    "gspo": Expected(
        [-2 * S0, -2 * S0, -2 * S0, 0.9997, 0.9997, 0.0, -1.0004, 3.63],
        [-2 * S0, -2 * S0, -2 * S0, 0, 0, 0, 0, 3.63],
        3,
        COMPLETION,
    ),
    "cispo": Expected(
        [-w * (old + math.log(ratio)) for w, old, ratio in zip(WEIGHTED, OLD, RATIOS, strict=True)],
        [-w for w in WEIGHTED],
        5,
        TOKEN,
        (("clip", 0.4), ("clip_high", 0.3)),
    ),
    "sapo": Expected([loss for loss, _ in GATES], [slope for _, slope in GATES], 0, COMPLETION),
}

# trainer / engine 1, 3, 1/4, 0.6, 1.9, 1, 0.45, 2.5 with a cap of 2: cut to at most 2, or left out beyond 1/2 .. 2
CORRECTIONS = {
    "truncated": ([1.0, 2.0, 0.25, 0.6, 1.9, 1.0, 0.45, 2.0], 2),
    "masked": ([1.0, 0.0, 0.0, 0.6, 1.9, 1.0, 0.0, 0.0], 4),
}


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def computed(module: Any, update: UpdateConfig, *, reference: bool = False) -> tuple[Tensor, Tensor, LossMetrics]:
    """The loss of the micro-batch above, its gradient by the log-probabilities, its metrics."""
    old = double(OLD)
    policy = (old + double(RATIOS).log()).requires_grad_()
    inputs = module.LossInputs(
        old_logprobs=old,
        engine_logprobs=old - double(ENGINE_RATIOS).log(),
        reference_logprobs=double(REFERENCE) if reference else None,
        advantages=double(ADVANTAGES),
        lengths=torch.tensor(LENGTHS),
    )
    loss, metrics = module.policy_loss(policy, inputs, module.StepTotals(*TOTALS), update)
    (gradient,) = torch.autograd.grad(loss, policy)
    return loss.detach(), gradient, metrics.read()


def agree(actual: Tensor, expected: list[float] | Tensor) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def check_loss(module: Any, name: str) -> None:
    expected = EXPECTED[name]
    loss, gradient, metrics = computed(module, UpdateConfig(loss=name, **dict(expected.settings)))  # type: ignore[arg-type]
    agree(loss, double(expected.losses) @ double(expected.share))
    agree(gradient, double(expected.gradient) * double(expected.share))
    assert metrics.tokens == 8
    assert metrics.means() == pytest.approx(
        {
            "loss": loss.item(),
            "kl": 0.0,
            "clip_fraction": expected.clipped / 8,
            "correction_fraction": 0.0,
            "ratio_mean": (1.5 + 0.5 + 1.1 + 1.5 + 0.5 + 1.7 + 1.25 + 1.21) / 8,
            "ratio_std": torch.std(double(RATIOS), correction=0).item(),
            "ratio_min": 0.5,
            "ratio_max": 1.7,
        },
        rel=1e-9,
    )


def check_correction(module: Any, name: str, kind: str) -> None:
    """The weights multiply each token's loss and gradient; what is averaged over stays."""
    expected, (weights, corrected) = EXPECTED[name], CORRECTIONS[kind]
    update = UpdateConfig(loss=name, correction=kind, correction_cap=2.0, **dict(expected.settings))  # type: ignore[arg-type]
    loss, gradient, metrics = computed(module, update)
    agree(loss, double(expected.losses) @ (double(weights) * double(expected.share)))
    agree(gradient, double(expected.gradient) * double(weights) * double(expected.share))
    assert metrics.means()["correction_fraction"] == corrected / 8
    assert metrics.means()["clip_fraction"] == expected.clipped / 8


def check_kl(module: Any) -> None:
    """k3 of every token, 0.1 of it, weighed by no correction and averaged as the loss is."""
    # reference / policy is 1 / ratio, the last reference being 0.3 nats lower: exp(d) - d - 1
    logs = [-math.log(ratio) for ratio in RATIOS[:-1]] + [-math.log(1.21) - 0.3]
    k3 = [math.exp(d) - d - 1 for d in logs]
    for name, share in (("grpo", COMPLETION), ("dr_grpo", FIXED)):
        for kind in ("none", "masked"):
            plain, plain_gradient, _ = computed(module, UpdateConfig(loss=name, correction=kind))  # type: ignore[arg-type]
            update = UpdateConfig(loss=name, correction=kind, kl=0.1)  # type: ignore[arg-type]
            loss, gradient, metrics = computed(module, update, reference=True)
            agree(loss - plain, 0.1 * double(k3) @ double(share))
            # d k3 / d policy = 1 - exp(reference - policy)
            agree(gradient - plain_gradient, 0.1 * double([1 - math.exp(d) for d in logs]) * double(share))
            assert metrics.means()["kl"] == pytest.approx(sum(k3) / 8, rel=1e-12)


def check_advantages(module: Any) -> None:
    # Means 2, 0.3, 2; the second group's rewards are alike but for rounding, so it has no signal.
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.1 + 0.2, 0.3, 0.3], [0.0, 0.0, 6.0]], dtype=torch.float64)
    assert module.signal(rewards).tolist() == [True, False, True]
    centred = double([-1, 0, 1, 0, 0, 0, -2, -2, 4]).reshape(3, 3)
    agree(module.advantages(rewards, scale="none"), centred)
    # standard deviations: ((1 + 0 + 1) / 2)^(1/2) = 1; ((4 + 4 + 16) / 2)^(1/2) = 12^(1/2)
    of_groups = centred / double([1, 1, 12**0.5])[:, None]
    agree(module.advantages(rewards, scale="group"), of_groups)
    agree(module.advantages(rewards), of_groups)
    assert (module.advantages(rewards)[1] == 0).all()
    # of all nine: sum 12.9, sum of squares 14 + 3 * 0.09 + 36 = 50.27
    of_batch = ((50.27 - 12.9**2 / 9) / 8) ** 0.5
    agree(module.advantages(rewards, scale="batch"), centred / of_batch)


def check_overlong(module: Any) -> None:
    # No penalty up to 80 of 100 tokens, then 1/20 a token down to -1.
    lengths = torch.tensor([[1, 80, 81], [90, 100, 101]])
    penalty = module.overlong_penalty(lengths, max_new_tokens=100, overlong_tokens=20)
    agree(penalty, double([0, 0, -0.05, -0.5, -1, -1]).reshape(2, 3))
    assert (module.overlong_penalty(lengths, max_new_tokens=100, overlong_tokens=0) == 0).all()


def check_agreement(module: Any) -> None:
    trainer = double(OLD)
    engine = trainer - double(ENGINE_RATIOS).log()
    first, second = (module.Agreement.of(trainer[part], engine[part]).read() for part in (slice(0, 3), slice(3, 8)))
    logs = [math.log(ratio) for ratio in ENGINE_RATIOS]  # trainer - engine
    for added in (first + second, second + first):
        assert added.means() == pytest.approx(
            {
                "engine_difference_mean": sum(map(abs, logs)) / 8,
                "engine_difference_max": math.log(4),  # of the ratio 1/4
                # k3 of KL(engine || trainer): ratio - log(ratio) - 1
                "engine_kl": sum(r - math.log(r) - 1 for r in ENGINE_RATIOS) / 8,
                "engine_ratio_mean": (1 + 3 + 0.25 + 0.6 + 1.9 + 1 + 0.45 + 2.5) / 8,
                "engine_ratio_min": 0.25,
                "engine_ratio_max": 3.0,
            },
            rel=1e-9,
        )


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_and_its_gradient_are_those_worked_out_by_hand(name: str) -> None:
    check_loss(grpo, name)


@pytest.mark.parametrize("kind", CORRECTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_correction_weighs_the_tokens_of_every_loss(name: str, kind: str) -> None:
    check_correction(grpo, name, kind)


def test_the_kl_term_is_k3_per_token_with_its_weight() -> None:
    check_kl(grpo)


def test_advantages_are_differences_to_the_group_scaled_as_asked_and_none_without_signal() -> None:
    check_advantages(grpo)


def test_the_overlong_penalty_falls_linearly_over_the_last_tokens() -> None:
    check_overlong(grpo)


def test_agreement_of_engine_and_trainer_is_measured_before_any_correction() -> None:
    check_agreement(grpo)


CHECKS = {
    "advantages": check_advantages,
    "overlong": check_overlong,
    "kl": check_kl,
    "agreement": check_agreement,
    **{name: lambda module, name=name: check_loss(module, name) for name in LOSSES},
    **{
        f"{kind} {name}": lambda module, name=name, kind=kind: check_correction(module, name, kind)
        for kind in CORRECTIONS
        for name in LOSSES
    },
}

# (what must fail, a text of the source, what it is replaced with)
MUTANTS = [
    ("advantages", "std(-1) > STD_FLOOR", "std(-1) >= 0"),
    ("advantages", "rewards_P_G - rewards_P_G.mean(-1, keepdim=True)", "rewards_P_G"),
    ("advantages", "mean(-1, keepdim=True)", "mean()"),
    ("advantages", "std(-1, keepdim=True).clamp", "std(-1, keepdim=True, correction=0).clamp"),
    ("advantages", "std().clamp", "std(-1, keepdim=True).clamp"),
    ("advantages", "std().clamp", "std(correction=0).clamp"),
    ("advantages", '*, scale: str = "group"', '*, scale: str = "none"'),
    ("overlong", "(max_new_tokens - overlong_tokens)", "max_new_tokens"),
    ("overlong", "excess / overlong_tokens", "excess / max_new_tokens"),
    ("overlong", ".clamp(0, 1)", ".clamp(min=0)"),
    ("overlong", ".clamp(0, 1)", ".clamp(max=1)"),
    ("overlong", "return -(excess", "return (excess"),
    ("kl", "difference = reference_logprobs - policy_logprobs", "difference = policy_logprobs - reference_logprobs"),
    ("kl", "torch.expm1(difference) - difference", "torch.expm1(difference)"),
    ("kl", "torch.expm1(difference) - difference", "difference.square() / 2"),
    ("kl", "losses + update.kl * token_kl", "losses + token_kl"),
    ("kl", "losses + update.kl * token_kl", "losses - update.kl * token_kl"),
    ("kl", "losses + update.kl * token_kl", "losses"),
    ("kl", "token_kl = kl_to_reference(policy_logprobs, ", "token_kl = kl_to_reference(policy_logprobs.detach(), "),
    (
        "grpo",
        "return pessimistic(torch.exp(policy_logprobs - inputs.old_logprobs)",
        "return pessimistic(policy_logprobs",
    ),
    (
        "grpo",
        "pessimistic(torch.exp(policy_logprobs - inputs.old_logprobs)",
        "pessimistic(torch.exp(inputs.old_logprobs - policy_logprobs)",
    ),
    ("grpo", "torch.minimum(unclipped, clipped)", "torch.maximum(unclipped, clipped)"),
    ("grpo", "torch.minimum(unclipped, clipped)", "clipped"),
    ("grpo", "torch.minimum(unclipped, clipped)", "unclipped"),
    ("grpo", "-torch.minimum(", "torch.minimum("),
    ("grpo", "clipped < unclipped", "clipped != unclipped"),
    ("grpo", "clipped = ratio.clamp(1 - clip_low", "clipped = ratio.clamp(1 - clip_high * 2"),
    ("grpo", "1 + clip_high) * advantage", "1 + 2 * clip_high) * advantage"),
    ("grpo", "clip_low: float = 0.2", "clip_low: float = 0.25"),
    ("grpo", "1 / totals.num_completions)", "1 / len(lengths))"),
    ("grpo", "1 / totals.num_completions) / lengths", "1 / totals.num_completions) / lengths.mean()"),
    ("grpo", '"grpo": Loss(clipped_ratio, completion_mean)', '"grpo": Loss(clipped_ratio, token_mean)'),
    ("grpo", "repeat_interleave(inputs.lengths, output_size=len(like))", "repeat(len(like))[: len(like)]"),
    ("bnpo", '"bnpo": Loss(clipped_ratio, token_mean)', '"bnpo": Loss(clipped_ratio, completion_mean)'),
    ("bnpo", "1 / totals.num_tokens", "1 / lengths.sum()"),
    ("dr_grpo", "totals.num_completions * totals.max_new_tokens", "totals.num_completions"),
    ("dr_grpo", "totals.num_completions * totals.max_new_tokens", "totals.num_tokens"),
    ("dr_grpo", "clipped_ratio, fixed_mean", "clipped_ratio, token_mean"),
    ("dapo", "clip_high=0.28", "clip_high=None"),
    ("dapo", "clip_high=0.28", "clip_low=0.28"),
    ("dapo", "clipped_ratio, token_mean, clip_high", "clipped_ratio, completion_mean, clip_high"),
    ("gspo", '"sum", lengths=inputs.lengths) / inputs.lengths', '"sum", lengths=inputs.lengths)'),
    (
        "gspo",
        '(log_ratio, "sum", lengths=inputs.lengths) / inputs.lengths',
        '(log_ratio, "max", lengths=inputs.lengths)',
    ),
    ("gspo", "policy_logprobs) + own", "policy_logprobs) + 0 * own"),
    ("gspo", "policy_logprobs) + own", "policy_logprobs) - own"),
    ("gspo", "policy_logprobs) + own", "policy_logprobs) + 2 * own"),
    ("gspo", "inputs.old_logprobs).detach()\n    mean", "inputs.old_logprobs)\n    mean"),
    ("gspo", "clip_low=3e-4", "clip_low=4e-4"),
    ("gspo", "clip_high=4e-4", "clip_high=3e-4"),
    ("gspo", "Loss(sequence_ratio, ", "Loss(clipped_ratio, "),
    ("gspo", "Loss(sequence_ratio, completion_mean", "Loss(sequence_ratio, token_mean"),
    ("cispo", "inputs.old_logprobs).detach()\n    weight", "inputs.old_logprobs)\n    weight"),
    ("cispo", "weight = ratio.clamp(1 - clip_low, 1 + clip_high)", "weight = ratio.clamp(max=1 + clip_high)"),
    ("cispo", "weight = ratio.clamp(1 - clip_low, 1 + clip_high)", "weight = ratio.clamp(min=1 - clip_low)"),
    ("cispo", "weight = ratio.clamp(1 - clip_low, 1 + clip_high)", "weight = ratio"),
    ("cispo", "TokenLosses(-weight *", "TokenLosses(weight *"),
    ("cispo", "inputs, ratio) * policy_logprobs, weight", "inputs, ratio) * policy_logprobs.exp(), weight"),
    ("cispo", "weight != ratio", "weight < ratio"),
    ("cispo", "Loss(clipped_weight, token_mean", "Loss(clipped_weight, completion_mean"),
    ("sapo", "gate = 4 / temperature *", "gate = 4 *"),
    ("sapo", "gate = 4 / temperature *", "gate ="),
    ("sapo", "torch.sigmoid(temperature * (ratio - 1))", "torch.sigmoid(ratio - 1)"),
    ("sapo", "torch.sigmoid(temperature * (ratio - 1))", "torch.sigmoid(temperature * ratio)"),
    ("sapo", "masked_fill(advantage > 0, positive)", "masked_fill(advantage < 0, positive)"),
    ("sapo", "SAPO_TEMPERATURES = (1.0, 1.05)", "SAPO_TEMPERATURES = (1.05, 1.05)"),
    ("sapo", "SAPO_TEMPERATURES = (1.0, 1.05)", "SAPO_TEMPERATURES = (1.0, 1.0)"),
    ("sapo", "TokenLosses(-gate", "TokenLosses(gate"),
    ("sapo", "Loss(soft_gate, completion_mean)", "Loss(soft_gate, token_mean)"),
    ("truncated grpo", "torch.exp(old_logprobs - engine_logprobs)", "torch.exp(engine_logprobs - old_logprobs)"),
    ("truncated grpo", "ratio.clamp(max=cap)", "ratio"),
    ("truncated grpo", "ratio.clamp(max=cap)", "ratio.clamp(1 / cap, cap)"),
    ("truncated grpo", "ratio.clamp(max=cap), ratio > cap", "ratio.clamp(max=cap), ratio < cap"),
    ("truncated gspo", "losses = losses * corrected.weights", "losses = losses * corrected.weights.mean()"),
    ("masked grpo", "(ratio < 1 / cap) | (ratio > cap)", "ratio > cap"),
    ("masked grpo", "(ratio < 1 / cap) | (ratio > cap)", "ratio < 1 / cap"),
    ("masked grpo", "torch.zeros_like(ratio), ratio)", "torch.zeros_like(ratio), torch.ones_like(ratio))"),
    ("masked sapo", "losses = losses * corrected.weights", "losses = losses"),
    (
        "agreement",
        "kl_to_reference(engine_logprobs, trainer_logprobs)",
        "kl_to_reference(trainer_logprobs, engine_logprobs)",
    ),
    ("agreement", "(trainer_logprobs - engine_logprobs).abs()", "(trainer_logprobs - engine_logprobs)"),
    ("agreement", "(trainer_logprobs - engine_logprobs).double()", "(engine_logprobs - trainer_logprobs).double()"),
    ("agreement", "difference_max=max(", "difference_max=min("),
]


def rebuilt(source: str) -> types.ModuleType:
    module = types.ModuleType("mutant")
    exec(compile(source, "mutant", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize(("check", "old", "new"), MUTANTS)
def test_a_mutant_fails_the_check_of_its_formula(check: str, old: str, new: str) -> None:
    source = inspect.getsource(grpo)
    assert source.count(old) == 1, f"{source.count(old)} places for a mutant of {old!r}"
    mutant = rebuilt(source.replace(old, new))
    with pytest.raises(AssertionError):
        CHECKS[check](mutant)


def test_the_unmutated_source_passes_every_check() -> None:
    rebuilt_unchanged = rebuilt(inspect.getsource(grpo))
    for check in CHECKS.values():
        check(rebuilt_unchanged)
    # every loss has a mutant of its own
    assert {check.split()[-1] for check, _, _ in MUTANTS} >= set(LOSSES) == set(grpo.LOSSES) == set(EXPECTED)


def test_groups_of_one_are_refused_and_so_is_an_unknown_scale() -> None:
    with pytest.raises(ValueError, match="G of 2 or more"):
        grpo.advantages(torch.ones(4, 1))
    with pytest.raises(ValueError, match="group, batch or none"):
        grpo.advantages(torch.ones(4, 2), scale="auto")


def test_a_kl_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="needs reference_logprobs"):
        computed(grpo, UpdateConfig(kl=0.1))


def test_k3_is_never_negative_and_unbiased() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(5).log_softmax(0), torch.randn(5).log_softmax(0)
    estimates = grpo.kl_to_reference(p, q)
    assert (estimates >= 0).all()
    assert (p.exp() * estimates).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_the_ratio_is_one_and_the_gradient_the_plain_policy_gradient(name: str) -> None:
    """For every loss, each averaged its own way; the values of cispo and sapo are others there, their gradients not."""
    torch.manual_seed(0)
    logits = torch.randn(8, 7, dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(-1).gather(-1, torch.randint(7, (8, 1))).squeeze(-1)
    inputs = LossInputs(logprobs.detach(), logprobs.detach(), None, double(ADVANTAGES), torch.tensor(LENGTHS))
    loss, metrics = grpo.policy_loss(logprobs, inputs, TOTALS, UpdateConfig(loss=name))  # type: ignore[arg-type]
    (ours,) = torch.autograd.grad(loss, logits, retain_graph=True)
    means = metrics.read().means()
    weights = double(ADVANTAGES).repeat_interleave(torch.tensor(LENGTHS)) * double(EXPECTED[name].share)
    (plain,) = torch.autograd.grad(-(weights * logprobs).sum(), logits)
    torch.testing.assert_close(ours, plain)
    if name not in ("cispo", "sapo"):
        agree(loss.detach(), -weights.sum())
    assert means["ratio_min"] == means["ratio_max"] == means["ratio_mean"] == 1.0
    assert means["clip_fraction"] == means["ratio_std"] == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_to_the_step(name: str) -> None:
    torch.manual_seed(1)
    lengths = [6, 2, 4, 1]
    old, engine, reference = (-torch.rand(13, dtype=torch.float64) for _ in range(3))
    policy = (-torch.rand(13, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(4, dtype=torch.float64)
    totals = StepTotals(num_completions=4, num_tokens=13, max_new_tokens=6)
    update = UpdateConfig(loss=name, kl=0.1, correction="truncated", correction_cap=1.2)  # type: ignore[arg-type]

    def part(first: int, last: int) -> tuple[Tensor, Tensor, LossMetrics]:
        tokens = slice(sum(lengths[:first]), sum(lengths[:last]))
        inputs = LossInputs(
            old[tokens], engine[tokens], reference[tokens], advantages[first:last], torch.tensor(lengths[first:last])
        )
        loss, metrics = grpo.policy_loss(policy[tokens], inputs, totals, update)
        return loss, torch.autograd.grad(loss, policy)[0], metrics.read()

    whole, first, second = part(0, 4), part(0, 3), part(3, 4)
    torch.testing.assert_close(first[0] + second[0], whole[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(first[1] + second[1], whole[1], rtol=1e-12, atol=0)
    added = first[2] + second[2]
    assert added.means() == pytest.approx(whole[2].means())
    assert dataclasses.asdict(added) == pytest.approx(dataclasses.asdict(whole[2]))
    assert whole[2].corrected > 0


def test_the_ratio_and_its_correction_are_not_differentiated_through_the_old_policy() -> None:
    old = double(OLD).requires_grad_()
    policy = double(OLD).requires_grad_()
    inputs = LossInputs(old, double(REFERENCE), None, double(ADVANTAGES), torch.tensor(LENGTHS))
    for kind in CORRECTIONS:
        weights = grpo.correction(old, double(REFERENCE), kind=kind, cap=2.0)
        assert weights is not None
        assert not weights.weights.requires_grad
    loss, _ = grpo.policy_loss(policy, inputs, TOTALS, UpdateConfig(loss="cispo"))
    assert torch.autograd.grad(loss, old, allow_unused=True) == (None,)


def test_a_step_of_no_tokens_has_figures() -> None:
    assert LossMetrics().means() == {
        "loss": 0.0,
        "kl": 0.0,
        "clip_fraction": 0.0,
        "correction_fraction": 0.0,
        "ratio_mean": 1.0,
        "ratio_std": 0.0,
        "ratio_min": 1.0,
        "ratio_max": 1.0,
    }
    assert Agreement().means()["engine_kl"] == 0.0


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({}, 0.2, 0.2),
        ({"clip": 0.3}, 0.3, 0.3),
        ({"clip_high": 0.4}, 0.2, 0.4),
        ({"loss": "dapo"}, 0.2, 0.28),
        ({"loss": "dapo", "clip": 0.1}, 0.1, 0.28),
        ({"loss": "gspo"}, 3e-4, 4e-4),
        ({"loss": "cispo"}, 1.0, 4.0),
        ({"loss": "cispo", "clip_high": 7.0}, 1.0, 7.0),
    ],
)
def test_a_clip_of_zero_is_the_loss_s_own(settings: dict[str, Any], low: float, high: float) -> None:
    assert grpo.clip_of(UpdateConfig(**settings)) == (low, high)


def test_sapo_has_no_clip_whatever_is_configured() -> None:
    plain, gradient, _ = computed(grpo, UpdateConfig(loss="sapo"))
    clipped, clipped_gradient, _ = computed(grpo, UpdateConfig(loss="sapo", clip=0.01, clip_high=0.01))
    assert torch.equal(plain, clipped)
    assert torch.equal(gradient, clipped_gradient)


def test_only_dr_grpo_leaves_advantages_undivided_by_itself_and_only_dapo_leaves_silent_groups_out() -> None:
    scales = {name: grpo.scale_of(UpdateConfig(loss=name)) for name in LOSSES}  # type: ignore[arg-type]
    assert scales == {name: "none" if name == "dr_grpo" else "group" for name in LOSSES}
    assert grpo.scale_of(UpdateConfig(loss="dr_grpo", scale_rewards="batch")) == "batch"
    assert [name for name in LOSSES if grpo.LOSSES[name].drops_silent_groups] == ["dapo"]


def test_the_learning_rate_warms_up_then_falls_linearly_to_zero_at_its_own_length() -> None:
    rates = [learning_rate_at(step, peak=1.0, warmup_steps=2, schedule_steps=6) for step in range(8)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    assert learning_rate_at(10**6, peak=1.0, warmup_steps=2, schedule_steps=0) == 1.0
