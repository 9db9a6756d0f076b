"""The memory plan: what fits is chosen, what does not is refused with what would help."""

import pytest

from stages.config import UserError
from stages.trainer.plan import PLANS, Sizes, choose_plan, longest_fitting, needed_bytes

# gpt-oss-20b with LoRA r=16 in bf16 and 8-bit AdamW, its embedding in the host's memory
SIZES = Sizes(
    width=2880, heads=64, heads_width=4096, keys_width=512, inner=2880, experts=32, top_k=4, held=13_712_739_328,
    number=2,
)  # fmt: skip


def test_the_roomiest_plan_that_fits_is_chosen() -> None:
    needs = [needed_bytes(SIZES, 4096, plan) for plan in PLANS]
    assert needs == sorted(needs, reverse=True)
    for need in needs:
        assert choose_plan(SIZES, 4096, need) == PLANS[needs.index(need)]
        assert needed_bytes(SIZES, 4096, choose_plan(SIZES, 4096, need)) <= need
    assert choose_plan(SIZES, 4096, 141e9) == PLANS[0]


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
