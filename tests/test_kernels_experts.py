"""The MXFP4 kernels against dequantized weights in float64."""

import pytest
import torch

from stages.kernels import reference
from stages.kernels.linear import Tile, linear, linear_parts
from stages.kernels.norms import add_norm, combine_norm, embed, embed_norm
from stages.kernels.packed_experts import (
    Launch,
    PackedExperts,
    PackedLora,
    Plan,
    dequantize,
    experts_decode,
    experts_prefill,
    stored_rows,
)
from stages.kernels.routing import route, router_logits
from stages.model import mxfp4
from stages.model.mxfp4 import Mxfp4
from stages.model.mxfp4_layout import relay, restore

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_mxfp4(num_experts, rows, inputs, *, largest=126, seed=0):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (num_experts, rows, inputs // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, largest, (num_experts, rows, inputs // 32), dtype=torch.uint8, generator=generator)
    return Mxfp4(blocks.to(DEVICE), scales.to(DEVICE))


def packed_layer(num_experts, width, inner, *, rank=0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + 100)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) * 0.3).to(DEVICE)

    gate_up, down = (
        random_mxfp4(num_experts, 2 * inner, width, seed=seed),
        random_mxfp4(num_experts, width, inner, seed=seed + 1),
    )
    biases = draw(num_experts, 2 * inner), draw(num_experts, width)
    loras = None, None
    if rank:
        loras = [
            (draw(num_experts, rank, width), draw(num_experts, 2 * inner, rank)),
            (draw(num_experts, rank, inner), draw(num_experts, width, rank)),
        ]
    rows = stored_rows(2 * inner, interleaved=True, device=DEVICE)
    packed = PackedExperts(
        gate_up=relay(gate_up, interleaved=True),
        down=relay(down, interleaved=False),
        gate_up_bias=biases[0][:, rows].contiguous(),
        down_bias=biases[1],
        gate_up_lora=PackedLora(loras[0][0].to(dtype), loras[0][1][:, rows].to(dtype).contiguous(), 0.5)
        if rank
        else None,
        down_lora=PackedLora(loras[1][0].to(dtype), loras[1][1].to(dtype), 0.5) if rank else None,
        alpha=1.702,
        limit=7.0,
    )
    dense = {"gate_up": mxfp4.dequantize(*gate_up, torch.float64).mT, "down": mxfp4.dequantize(*down, torch.float64).mT}
    if rank:
        for name, (a, b) in zip(dense, loras, strict=True):
            dense[name] = dense[name] + 0.5 * (b.to(dtype).double() @ a.to(dtype).double()).mT
    dense |= {"gate_up_bias": biases[0].double(), "down_bias": biases[1].double(), "alpha": 1.702, "limit": 7.0}
    return packed, dense


@pytest.mark.parametrize(("rows", "inputs"), [(32, 64), (48, 128), (32, 256), (64, 576), (16, 320)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_relaid_weights_are_the_same_bytes_and_go_back_to_the_checkpoints(rows, inputs, interleaved):
    quantized = random_mxfp4(3, rows, inputs, largest=129)
    quantized.scales[0, 0, 0] = 0
    relaid = relay(quantized, interleaved=interleaved)
    assert relaid.words.nbytes == quantized.blocks.nbytes
    assert relaid.scales.nbytes == quantized.scales.nbytes
    back = restore(relaid)
    assert torch.equal(back.blocks, quantized.blocks)
    assert torch.equal(back.scales, quantized.scales)


@pytest.mark.parametrize("inputs", [64, 320, 576])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_kernel_unpacks_every_code_under_every_scale(inputs, interleaved):
    quantized = random_mxfp4(2, 32, inputs)
    quantized.scales.view(-1)[:] = torch.arange(quantized.scales.numel(), device=DEVICE) % 128 + 1
    expected = mxfp4.dequantize(*quantized, torch.float32)
    relaid = relay(quantized, interleaved=interleaved)
    assert torch.equal(dequantize(relaid, torch.float32), expected)
    assert torch.equal(dequantize(relaid, torch.float32, experts=slice(1, 2)), expected[1:])


def test_a_scale_above_the_layouts_range_is_refused():
    quantized = random_mxfp4(1, 16, 64)
    quantized.scales[0, 3, 1] = 129
    with pytest.raises(ValueError, match="129"):
        relay(quantized, interleaved=False)


@pytest.mark.parametrize(
    ("rows", "num_experts", "tile"), [(1, 8, 8), (3, 32, 8), (33, 32, 8), (64, 32, 16), (40, 128, 16)]
)
def test_every_assignment_stands_in_one_tile_of_its_expert(rows, num_experts, tile):
    logits = torch.randn(rows, num_experts, generator=torch.Generator().manual_seed(rows)).to(DEVICE)
    logits[0, : num_experts // 2] = 1.0  # ties
    routing = route(logits, top_k=4, tile=tile)
    values, expected = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(routing.indices.long(), expected[:, :4])
    torch.testing.assert_close(routing.weights, values[:, :4].softmax(-1))
    seen = []
    for expert, first, count in routing.tiles.tolist():
        assert 0 <= count <= tile
        for assigned in routing.order[first : first + count].tolist():
            assert routing.indices[assigned // 4, assigned % 4] == expert
            seen.append(assigned)
    assert sorted(seen) == list(range(4 * rows))


def test_all_tokens_may_choose_the_same_experts():
    logits = torch.zeros(64, 32, device=DEVICE)
    logits[:, 5:9] = 1
    routing = route(logits, top_k=4, tile=8)
    counts = torch.zeros(32, dtype=torch.int64)
    for expert, _, count in routing.tiles.tolist():
        counts[expert] += count
    assert counts[5:9].tolist() == [64] * 4
    assert counts.sum() == 256


PLANS = [
    Plan(99, 8, 0, Launch(1, 1, 2), Launch(1, 1, 2)),
    Plan(99, 16, 8, Launch(2, 4, 2), Launch(4, 4, 2)),
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("rows", "width", "inner", "rank"), [(1, 128, 64, 0), (2, 320, 64, 16), (1, 64, 576, 16), (9, 64, 64, 0)]
)
def test_decode_equals_the_oracle_on_dequantized_weights(plan, rows, width, inner, rank):
    packed, dense = packed_layer(8, width, inner, rank=rank)
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator).to(DEVICE)
    logits = torch.randn(rows, 8, generator=generator).to(DEVICE)
    routing = route(logits, top_k=4, tile=plan.tokens)
    partials = experts_decode(hidden, routing, packed, plan=plan)
    residual = torch.zeros(rows, width, device=DEVICE)
    weight = torch.rand(width, generator=generator).to(DEVICE)
    out = combine_norm(residual, partials, routing.weights, weight, dtype=torch.float32, eps=1e-5)
    expected = reference.experts(hidden.double(), routing.indices.long(), routing.weights.double(), **dense)
    scale = expected.abs().max()
    assert (residual - expected).abs().max() < 1e-5 * scale
    norm = expected * (expected.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    assert (out - norm).abs().max() < 1e-4
    prefill = experts_prefill(hidden, routing.indices, routing.weights, packed)
    assert (prefill - expected).abs().max() < 1e-5 * scale


def test_a_bfloat16_step_errs_no_more_than_plain_bfloat16_does():
    packed, dense = packed_layer(8, 320, 64, dtype=torch.bfloat16)
    hidden = torch.randn(3, 320, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    routing = route(torch.randn(3, 8, generator=torch.Generator().manual_seed(2)).to(DEVICE), top_k=4, tile=8)
    partials = experts_decode(hidden, routing, packed, plan=PLANS[0])
    total = (partials.sum(0).view(3, 4, -1) * routing.weights[..., None]).sum(1)
    expected = reference.experts(hidden.double(), routing.indices.long(), routing.weights.double(), **dense)
    low = {name: value.bfloat16() if isinstance(value, torch.Tensor) else value for name, value in dense.items()}
    plain = reference.experts(hidden, routing.indices.long(), routing.weights.bfloat16(), **low)
    assert (total - expected).norm() <= 2 * (plain - expected).norm()


def test_rows_of_an_embedding_are_its_rows():
    embedding = torch.randn(50, 96, device=DEVICE, dtype=torch.bfloat16)
    tokens = torch.tensor([3, 49, 0, 3], device=DEVICE)
    assert torch.equal(embed(embedding, tokens), embedding[tokens])
    if DEVICE != "cpu":
        assert torch.equal(embed(embedding.cpu().pin_memory(), tokens), embedding[tokens])


def test_the_streams_kernels_equal_plain_arithmetic():
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    embedding, weight, residual = draw(50, 96), draw(96), torch.empty(3, 96, device=DEVICE)
    tokens, rows = torch.tensor([7, 0, 49, 3], device=DEVICE), torch.tensor([2, 0, 3], dtype=torch.int32, device=DEVICE)

    def norm(x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    out = embed_norm(embedding, tokens, rows, residual, weight, dtype=torch.float32, eps=1e-5)
    torch.testing.assert_close(residual, embedding[[49, 7, 3]])
    torch.testing.assert_close(out, norm(residual))
    delta, bias, b = draw(3, 96 + 3), draw(96), draw(96, 3)
    expected = residual + delta[:, :96] + bias + 0.5 * delta[:, 96:] @ b.mT
    out = add_norm(
        residual, torch.stack((delta * 0.25, delta * 0.75)), bias, b, weight, dtype=torch.float32, scale=0.5, eps=1e-5
    )
    torch.testing.assert_close(residual, expected)
    torch.testing.assert_close(out, norm(expected))
    router, router_bias = draw(8, 96), draw(8)
    torch.testing.assert_close(router_logits(out, router, router_bias), out @ router.mT + router_bias)


@pytest.mark.parametrize(("rows", "outputs", "inputs", "parts"), [(1, 40, 96, 1), (5, 70, 256, 2), (40, 33, 128, 1)])
def test_products_equal_plain_ones_and_on_a_card_a_rows_bits_do_not_depend_on_its_company(rows, outputs, inputs, parts):
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, inputs, generator=generator).to(DEVICE) for n in (rows, outputs))
    found = linear_parts(x, weight, parts=parts)
    torch.testing.assert_close(found.sum(0), x @ weight.mT, atol=1e-4, rtol=1e-5)
    for tile in (Tile(0, 16, 8, 32, 1, 2, early=True), Tile(0, 32, 16, 64, 4, 3)):
        torch.testing.assert_close(linear_parts(x, weight, parts=parts, tile=tile), found, atol=1e-4, rtol=1e-5)
        if DEVICE == "cuda":  # the interpreter's products are NumPy's
            low = x.bfloat16(), weight.bfloat16()
            lone = linear_parts(low[0][-1:], low[1], parts=parts, tile=tile)
            assert torch.equal(lone[:, 0], linear_parts(*low, parts=parts)[:, -1])
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
