"""The memory plan: what fits is chosen, what does not is refused with what would help."""

import pytest
import torch

from stages.config import UpdateConfig, UserError
from stages.model.experts import Experts
from stages.model.shapes import SHAPES
from stages.model.synthetic import synthetic_policy
from stages.trainer.plan import KEPT_SHARE, PLANS, Sizes, choose_plan, held_bytes, longest_fitting, needed_bytes

# gpt-oss-20b with LoRA r=16 in bf16 and 8-bit AdamW, its embedding in the host's memory
SIZES = Sizes(
    width=2880, heads=64, heads_width=4096, keys_width=512, inner=2880, experts=32, top_k=4, layers=24, keepable=24,
    held=13_712_739_328,
    number=2,
)  # fmt: skip


def test_the_fastest_plan_that_fits_is_chosen() -> None:
    needs = [needed_bytes(SIZES, 4096, plan) for plan in PLANS]
    assert needs == sorted(needs, reverse=True)
    for need in set(needs):
        assert choose_plan(SIZES, 4096, need) == PLANS[needs.index(need)]
    assert choose_plan(SIZES, 4096, 141e9) == PLANS[0]._replace(kept_attention=24, kept_experts=24)


def test_layers_keep_their_graphs_in_their_share_of_what_is_left_over() -> None:
    least = needed_bytes(SIZES, 4096, PLANS[0])
    kept = []
    for budget in (least, least + 1e9, 20e9, 24e9, 40e9):
        plan = choose_plan(SIZES, 4096, budget)
        assert plan._replace(kept_attention=0, kept_experts=0) == PLANS[0]
        assert needed_bytes(SIZES, 4096, plan) <= least + KEPT_SHARE * (budget - least)
        kept.append((plan.kept_attention, plan.kept_experts))
    assert kept == [(0, 0), (5, 0), (22, 0), (24, 8), (24, 24)]


def test_experts_that_autograd_trains_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = synthetic_policy(SHAPES["tiny"], lora_rank=4, dtype=torch.float32, device="cpu", seed=1)
    monkeypatch.setattr(Experts, "trained_by_kernels", True)
    assert Sizes.of(policy, held=0).keepable == SHAPES["tiny"].num_layers
    monkeypatch.setattr(Experts, "trained_by_kernels", False)
    plan = choose_plan(Sizes.of(policy, held=0), 256, 141e9)
    assert (plan.kept_attention, plan.kept_experts) == (SHAPES["tiny"].num_layers, 0)


def test_memory_grows_linearly_with_the_length() -> None:
    needs = [needed_bytes(SIZES, tokens, PLANS[-1]) - SIZES.held for tokens in (2**17, 2**18, 2**19)]
    assert needs[2] - needs[1] == pytest.approx(2 * (needs[1] - needs[0]), rel=0.01)


def test_a_length_that_cannot_fit_is_refused_with_one_that_can() -> None:
    fitting = longest_fitting(SIZES, 24e9)
    assert 131_072 <= fitting < 262_144
    choose_plan(SIZES, fitting, 24e9)
    with pytest.raises(UserError, match=r"an update of 262144 tokens at once needs [0-9.]+ GB") as caught:
        choose_plan(SIZES, 262_144, 24e9)
    assert f"at most {fitting} tokens" in str(caught.value.hint)
    assert "adamw_8bit" in str(caught.value.hint)
    with pytest.raises(UserError, match=r"need.*13\.7 GB are weights") as caught:
        choose_plan(SIZES, 256, 12e9, optimizer="adamw_8bit")
    assert "a budget of 14." in str(caught.value.hint)
    assert "adamw_8bit" not in str(caught.value.hint)


@pytest.mark.gpu
def test_what_else_lies_on_the_card_counts() -> None:
    policy = synthetic_policy(SHAPES["tiny"], lora_rank=4, dtype=torch.bfloat16, device="cuda", seed=1)
    update = UpdateConfig()
    optimizer = torch.optim.AdamW([parameter for _, parameter in policy.parameters()])
    before = held_bytes(policy, update, optimizer)
    rest = torch.empty(300 << 20, dtype=torch.uint8, device="cuda")
    assert held_bytes(policy, update, optimizer) - before == pytest.approx(rest.nbytes, abs=40 << 20)
    del rest
    assert held_bytes(policy, update, optimizer) == pytest.approx(before, abs=40 << 20)


def test_gradients_and_moments_count_before_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = synthetic_policy(SHAPES["tiny"], lora_rank=4, dtype=torch.float32, device="cpu", seed=1)
    parameters = [parameter for _, parameter in policy.parameters()]
    numbers = sum(parameter.numel() for parameter in parameters)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    optimizer = torch.optim.AdamW(parameters)
    for name, of_number in (("adamw", 8), ("adamw_8bit", 2), ("paged_adamw_8bit", 2)):
        assert held_bytes(policy, UpdateConfig(optimizer=name), optimizer) == 1000 + (4 + of_number) * numbers
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    assert held_bytes(policy, UpdateConfig(), optimizer) == 1000 + 8 * numbers
    optimizer.step()
    assert held_bytes(policy, UpdateConfig(), optimizer) == 1000
