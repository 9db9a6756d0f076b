"""Training through MXFP4 experts against float64 autograd on dequantized weights."""

import pytest
import torch

from stages.kernels import reference, trained_experts
from stages.kernels.experts import Lora
from stages.kernels.routing import sort_by_expert
from stages.kernels.trained_experts import ALL_AT_ONCE, Tiling
from stages.model import mxfp4
from stages.model.mxfp4_layout import relay
from tests.test_kernels_experts import DEVICE, random_mxfp4

pytest.importorskip("triton")
NUM_EXPERTS, TOP_K, SCALE = 5, 2, 0.5


def layer(width, inner, rank, *, seed=0):
    """The frozen layer; a function hidden, weights, factors -> out in any dtype; factors float32 by name."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) * 0.3).to(DEVICE)

    gate_up = random_mxfp4(NUM_EXPERTS, 2 * inner, width, seed=seed)
    down = random_mxfp4(NUM_EXPERTS, width, inner, seed=seed + 1)
    biases = draw(NUM_EXPERTS, 2 * inner), draw(NUM_EXPERTS, width)
    frozen = trained_experts.frozen_experts(
        relay(gate_up, interleaved=True),
        relay(down, interleaved=False),
        gate_up_bias=biases[0],
        down_bias=biases[1],
        alpha=1.702,
        limit=7.0,
    )
    sizes = ((rank, width), (2 * inner, rank), (rank, inner), (width, rank))
    factors = [draw(NUM_EXPERTS, *size) for size in sizes] if rank else []

    def oracle(hidden, indices, weights, factors):
        dtype = hidden.dtype
        dense = [mxfp4.dequantize(*weight, dtype).mT for weight in (gate_up, down)]
        if factors:
            a1, b1, a2, b2 = factors
            dense = [dense[0] + SCALE * (b1 @ a1).mT, dense[1] + SCALE * (b2 @ a2).mT]
        return reference.experts(
            hidden, indices, weights, gate_up=dense[0], down=dense[1], gate_up_bias=biases[0].to(dtype),
            down_bias=biases[1].to(dtype), alpha=1.702, limit=7.0,
        )  # fmt: skip

    return frozen, oracle, factors


def ours(frozen, tiling=ALL_AT_ONCE):
    def compute(hidden, indices, weights, factors):
        loras = (Lora(factors[0], factors[1], SCALE), Lora(factors[2], factors[3], SCALE)) if factors else (None, None)
        return trained_experts.trained_experts(
            hidden, indices, weights, frozen, gate_up_lora=loras[0], down_lora=loras[1], tiling=tiling
        )

    return compute


def tokens(num_rows, width, *, experts=NUM_EXPERTS):
    """Hidden, indices, weights and a gradient; only the first `experts` are chosen."""
    generator = torch.Generator().manual_seed(num_rows)
    scores = torch.rand(num_rows, experts, generator=generator)
    indices = scores.argsort(-1)[:, :TOP_K]
    weights = torch.rand(num_rows, TOP_K, generator=generator).softmax(-1)
    hidden, grad = torch.randn(2, num_rows, width, generator=generator)
    return hidden.to(DEVICE), indices.to(DEVICE), weights.to(DEVICE), grad.to(DEVICE)


def values_and_grads(compute, hidden, indices, weights, factors, grad, dtype, weights_dtype=None):
    """The output, and the gradients of hidden, weights and the factors."""
    leaves = [hidden.to(dtype), weights.to(weights_dtype or dtype), *(factor.to(dtype) for factor in factors)]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = compute(leaves[0], indices, leaves[1], leaves[2:])
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize(
    ("rows", "width", "inner", "rank", "experts"),
    [(20, 64, 64, 0, 5), (20, 128, 64, 6, 4), (1, 64, 64, 4, 2)],
)
def test_output_and_gradients_equal_float64_autograd(rows, width, inner, rank, experts):
    frozen, oracle, factors = layer(width, inner, rank)
    given = tokens(rows, width, experts=experts)
    expected = values_and_grads(oracle, *given[:3], factors, given[3], torch.float64)
    for tiling in (Tiling(rows=12, experts=3), ALL_AT_ONCE):
        found = values_and_grads(ours(frozen, tiling), *given[:3], factors, given[3], torch.float32)
        assert len(found) == len(expected) == (7 if rank else 3)
        for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            assert (mine - theirs).abs().max() <= 2e-5 * theirs.abs().max(), index


@pytest.mark.parametrize(("rows", "experts", "chosen"), [(1, 4, 4), (700, 32, 32), (40, 5, 3), (300, 128, 100)])
def test_assignments_are_sorted_by_expert_and_within_one_in_their_order(rows, experts, chosen):
    generator = torch.Generator().manual_seed(rows)
    indices = torch.rand(rows, chosen, generator=generator).argsort(-1)[:, :TOP_K].to(DEVICE)
    found = sort_by_expert(indices, experts)
    flat = indices.flatten()
    right = flat.argsort(stable=True)
    assert torch.equal(found.assigned, right)
    assert torch.equal(found.owner, flat[right])
    assert torch.equal(found.places, right.argsort())
    assert torch.equal(found.ends, flat.bincount(minlength=experts).cumsum(0).int())


def test_gates_and_ups_beyond_the_limit_have_no_gradient():
    frozen, oracle, factors = layer(64, 64, 4)
    hidden, indices, weights, grad = tokens(6, 64)
    given = (8 * hidden, indices, weights)
    expected = values_and_grads(oracle, *given, factors, grad, torch.float64)
    found = values_and_grads(ours(frozen), *given, factors, grad, torch.float32)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("tiling", [ALL_AT_ONCE, Tiling(3, 2)])
def test_without_its_forward_or_with_what_forward_kept_the_gradients_are_the_same(tiling):
    frozen, _, factors = layer(64, 64, 4)
    hidden, indices, weights, grad = tokens(8, 64)
    leaves = [factor.requires_grad_() for factor in factors]
    loras = Lora(leaves[0], leaves[1], SCALE), Lora(leaves[2], leaves[3], SCALE)
    grads = []
    for options in ({}, {"only_backward": True}, {"keep": True}):
        out = trained_experts.trained_experts(
            hidden, indices, weights, frozen, gate_up_lora=loras[0], down_lora=loras[1], tiling=tiling, **options
        )
        grads.append(torch.autograd.grad(out, leaves, grad))
    for whole, backward, kept in zip(*grads, strict=True):
        assert torch.equal(whole, backward)
        assert torch.equal(whole, kept)


def assert_errs_at_most_twice(dtype, experts, *, width, inner, rows):
    """What training computes in 16 bits lies at most twice as far from float64 as plain autograd in that type."""
    frozen, oracle, factors = layer(width, inner, 16)
    hidden, indices, weights, grad = tokens(rows, width, experts=experts)
    factors = [factor.to(dtype).float() for factor in factors]
    hidden, grad = hidden.to(dtype).float(), grad.to(dtype).float()
    expected = values_and_grads(oracle, hidden, indices, weights, factors, grad, torch.float64)
    plain = values_and_grads(oracle, hidden, indices, weights, factors, grad, dtype)
    found = values_and_grads(ours(frozen), hidden, indices, weights, factors, grad, dtype, weights_dtype=torch.float32)
    for index, (mine, low, exact) in enumerate(zip(found, plain, expected, strict=True)):
        assert (mine - exact).norm() <= 2 * (low - exact).norm(), index


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_errs_no_more_than_twice_what_plain_autograd_does(dtype):
    assert_errs_at_most_twice(dtype, 3, width=192, inner=128, rows=60)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [5, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_the_card_in_16_bits_it_errs_no_more_than_twice_what_plain_autograd_does(dtype, experts):
    assert_errs_at_most_twice(dtype, experts, width=576, inner=320, rows=200)
