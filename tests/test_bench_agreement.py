"""How far engine and trainer agree, as `bench update --agreement` measures it, and transformers with itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.bench import agreement, peers
from stages.bench.agreement import Scored
from stages.bench.update_step import Training, open_policy
from stages.engine import Engine
from tests.tiny_training import CPU, EXACT, TINY, exact_training


@pytest.fixture
def training() -> Training:
    return exact_training()


def test_engine_and_trainer_agree_while_the_policy_moves(training: Training) -> None:
    before = [parameter.detach().clone() for _, parameter in training.policy.parameters()]
    case = agreement.Case(2, 2, 10, 20, 8)
    row = agreement.measure(training, case, updates=3)
    assert row["difference_max"] < 1e-5
    assert row["k3"] < 1e-9
    assert abs(row["ratio_mean"] - 1) < 1e-5
    assert row["tokens"] == 3 * 4 * 8
    assert len(row["updates"]) == 3
    assert row["replay_difference_max"] < 1e-5
    assert row["sets_differ"] == row["replay_sets_differ"] == row["replay_own_sets_differ"] == 0
    moved = [(a - b).abs().max() for a, (_, b) in zip(before, training.policy.parameters(), strict=True)]
    assert max(moved) > 1e-3  # far enough that a stale engine would be seen


def test_replayed_routes_differ_nowhere_and_are_told_apart(training: Training) -> None:
    case = agreement.Case(2, 2, 10, 20, 8)
    engine = Engine(training.policy, max_slots=4, max_new_tokens=8)
    sampled = engine.run(agreement.requests_of(training, case, seed=0))
    completions: list[Any] = []
    scored = agreement.scored(training, agreement.samples_of(sampled, case, replay=False))
    for completion, each in zip(sampled, scored, strict=True):
        assert each.routes is not None
        assert each.routes.shape == (len(completion.prompt_ids) + 7, 2, 4)
        completions.append(SimpleNamespace(**(vars(completion) | {"routes": each.routes.to(torch.uint8)})))
    completions[0].routes[-3, 1] = (completions[0].routes[-3, 1] + 1) % 8
    row = agreement.update_row(training, completions, case)
    computed = sum(len(each.prompt_ids) + 7 for each in completions)
    assert row["sets_differ"] == pytest.approx(1 / (2 * computed))
    assert row["replay_sets_differ"] == 0
    assert row["replay_own_sets_differ"] == pytest.approx(1 / (2 * computed))
    assert row["replay_tokens"] == row["tokens"] == 32


def test_the_figures_of_agreement_are_those_by_hand() -> None:
    routes = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])  # [R, layers, k]
    swapped = routes.flip(-1)
    other = routes.clone()
    other[1, 0, 1] = 0
    engine = [Scored(torch.tensor([-1.0, -2.0]), routes), Scored(torch.tensor([-3.0]), routes)]
    ours = [Scored(torch.tensor([-1.0, -1.5]), swapped), Scored(torch.tensor([-3.25]), other)]
    row = agreement.compared(engine, ours)
    assert row["tokens"] == 3
    assert row["k3"] == pytest.approx((0 + (1.6487213 - 1.5) + (0.7788008 - 0.75)) / 3, rel=1e-6)
    assert row["ratio_mean"] == pytest.approx((1 + 1.6487213 + 0.7788008) / 3, rel=1e-6)
    assert row["difference_mean"] == pytest.approx(0.25)
    assert row["difference_max"] == 0.5
    assert row["sets_differ"] == 1 / 8
    assert "sets_differ" not in agreement.compared([Scored(ours[0].logprobs, None)], ours[:1])
    longer = torch.cat((torch.full((3, 2, 2), 9), routes))
    assert not agreement.sets_differ(longer, routes).any()  # both end at the same token


def test_a_summary_has_means_the_largest_maximum_and_all_tokens() -> None:
    rows = [
        {"tokens": 8, "k3": 1.0, "ratio_mean": 1.0, "difference_mean": 2.0, "difference_max": 5.0},
        {"tokens": 8, "k3": 3.0, "ratio_mean": 1.5, "difference_mean": 4.0, "difference_max": 4.0},
    ]
    assert agreement.summary(rows) == {
        "k3_last": 3.0, "tokens": 16, "k3": 2.0, "ratio_mean": 1.25, "difference_mean": 3.0, "difference_max": 5.0
    }  # fmt: skip


@torch.no_grad()
def test_the_yardstick_has_the_policys_own_weights() -> None:
    policy = open_policy(EXACT, device=CPU)
    model = peers.transformers_model(TINY, device=CPU, seed=1, dtype=torch.float32, unpacked=True)
    ids = torch.randint(0, TINY.vocabulary, (1, 40), generator=torch.Generator().manual_seed(0))
    with policy.adapter_disabled():
        ours = policy.model(ids).logits
    assert (model(ids).logits - ours).abs().max() < 1e-4
    assert (model(ids).logits - policy.model(ids).logits).abs().max() > 1e-2


def test_transformers_agrees_with_itself_at_another_batch_shape_in_fp32() -> None:
    row = agreement.yardstick(EXACT, device=CPU)
    assert row["tokens"] == 8 * 8
    assert row["difference_max"] < 1e-4
    assert row["sets_differ"] == 0


def test_scored_rows_are_the_last_tokens_of_each_row() -> None:
    model = peers.transformers_model(TINY, device=CPU, seed=1, dtype=torch.float32)
    rows = [(5, 6, 7, 8, 9, 10), (11, 12, 13)]
    found = agreement.scored_rows(model, rows, 2)
    for row, each in zip(rows, found, strict=True):
        logits = model(torch.tensor([row])).logits[0].log_softmax(-1)
        expected = torch.stack([logits[len(row) - 3, row[-2]], logits[len(row) - 2, row[-1]]])
        assert torch.allclose(each.logprobs, expected, atol=1e-4)
        assert each.routes is not None
        assert each.routes.shape == (2, 2, 4)
