"""Every path of the kernels against the plain oracles in float64, values and gradients."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from stages.kernels import reference
from stages.kernels.attention import Partial, apply_sinks, attend, merge, sink_attention
from stages.kernels.experts import Lora, experts, experts_fixed_shape
from stages.kernels.launch import Path, interpreted
from stages.kernels.logprobs import Tile, token_logprobs
from stages.kernels.norms import add_rms_norm_grad, advance, rms_norm
from stages.kernels.rotary import rotate
from stages.model.experts import DenseWeight, PackedWeight
from stages.model.mxfp4 import dequantize, quantize

F64 = torch.float64


def by_triton_and(plain: str) -> pytest.MarkDecorator:
    """The test by path `plain` and, where its interpreter runs, by Triton's."""
    triton = pytest.param("triton", marks=pytest.mark.skipif(not interpreted(), reason="needs the interpreter"))
    return pytest.mark.parametrize("path", [plain, triton])


def attention_inputs(batch: int, queries: int, keys: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(queries * 1000 + keys)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=generator).requires_grad_()

    return draw(batch, 8, queries, 32), draw(batch, 2, keys, 32), draw(batch, 2, keys, 32), draw(8)


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (127, 127), (128, 128), (129, 129), (1, 300), (600, 700)])
def test_sinks_by_log_sum_exp_equal_an_extra_softmax_column_with_every_gradient(
    queries: int, keys: int, window: int | None
) -> None:
    inputs = attention_inputs(2, queries, keys)
    visible = reference.causal_window(queries, keys, window)
    expected = reference.sink_attention(*inputs, scale=0.18, visible=visible)
    # The kernel's softmax is float32 whatever goes in: 1e-5 is a few of its roundings, summed in gradients.
    out = sink_attention(*inputs, scale=0.18, window=window)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(expected.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad((out * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    for name, mine, right in zip(("query", "key", "value", "sinks"), ours, theirs, strict=True):
        error = float((mine - right).norm() / right.norm().clamp(min=1e-6))
        assert error < 5e-5, f"gradient of {name} is off by {error}"


def test_the_window_counts_the_query_itself() -> None:
    query, key, value, sinks = (x.detach() for x in attention_inputs(1, 200, 200))
    out = sink_attention(query, key, value, sinks, scale=0.18, window=128)
    value[:, :, 199 - 128] += 100.0  # one before the last query's window
    assert torch.equal(sink_attention(query, key, value, sinks, scale=0.18, window=128)[:, :, 199], out[:, :, 199])
    value[:, :, 199 - 127] += 100.0  # the oldest it sees
    assert not torch.allclose(
        sink_attention(query, key, value, sinks, scale=0.18, window=128)[:, :, 199], out[:, :, 199]
    )


def test_a_row_that_sees_nothing_gives_zero_and_no_nan() -> None:
    query, key, value, sinks = attention_inputs(1, 4, 4)
    mask = torch.tensor([[False, False, True, True]])
    out = sink_attention(query, key, value, sinks, scale=0.18, key_mask=mask)
    assert out[:, :, :2].abs().max() == 0
    alone = sink_attention(query[:, :, 2:], key[:, :, 2:], value[:, :, 2:], sinks, scale=0.18)
    torch.testing.assert_close(out[:, :, 2:], alone)
    for gradient in torch.autograd.grad(out.sum(), (query, key, value, sinks)):
        assert torch.isfinite(gradient).all()


def test_pieces_of_the_keys_merge_into_the_whole() -> None:
    query, key, value, sinks = (x.detach().float() for x in attention_inputs(1, 1, 50))
    query = query.unflatten(1, (2, 4)).squeeze(3)  # [1, K, G, C]
    whole = attend(query, key, value, scale=0.18)
    merged = merge(
        attend(query, key[:, :, :13], value[:, :, :13], scale=0.18),
        attend(query, key[:, :, 13:], value[:, :, 13:], scale=0.18),
    )
    torch.testing.assert_close(merged.out, whole.out)
    torch.testing.assert_close(merged.lse, whole.lse)
    nothing = Partial(torch.zeros_like(whole.out), torch.full_like(whole.lse, -torch.inf))
    assert torch.equal(merge(whole, nothing).out, whole.out)
    assert apply_sinks(nothing, sinks.view(1, 2, 4)).abs().max() == 0


def test_attention_shapes_that_do_not_fit_are_named() -> None:
    query, key, value, sinks = attention_inputs(1, 4, 4)
    with pytest.raises(ValueError, match="do not fit"):
        sink_attention(query, key, value, sinks[:7], scale=1.0)


def expert_inputs(
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor, PackedWeight | DenseWeight, PackedWeight | DenseWeight]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = []
    for columns, rows in ((64, 192), (96, 64)):  # D 64, F 96
        quantized, bias = quantize(draw(8, rows, columns) / columns**0.5), draw(8, rows) * 0.1
        dense = dequantize(*quantized, F64).mT.contiguous()
        weights.append(
            PackedWeight(quantized, bias.to(F64), interleaved=False) if packed else DenseWeight(dense, bias.to(F64))
        )
    hidden = (draw(40, 64) * 3).to(F64).requires_grad_()
    logits = draw(40, 8)
    logits[:, 5] = -9.0  # an expert nobody chooses
    routing, indices = logits.topk(4)
    return hidden, indices, routing.softmax(-1).to(F64).requires_grad_(), weights[0], weights[1]


@pytest.mark.parametrize("packed", [False, True])
def test_experts_with_lora_equal_a_loop_over_tokens_with_every_gradient(packed: bool) -> None:
    hidden, indices, routing, gate_up, down = expert_inputs(packed)
    generator = torch.Generator().manual_seed(4)
    shapes = ((8, 3, 64), (8, 192, 3), (8, 3, 96), (8, 64, 3))
    factors = [(torch.randn(s, generator=generator, dtype=F64) * 0.2).requires_grad_() for s in shapes]
    loras = Lora(factors[0], factors[1], 2.0), Lora(factors[2], factors[3], 2.0)
    settings = {"alpha": 1.702, "limit": 7.0}
    merged = [
        weight.stack(F64) + 2.0 * torch.einsum("eor,eri->eio", lora.b, lora.a)
        for weight, lora in zip((gate_up, down), loras, strict=True)
    ]
    biases = {"gate_up_bias": gate_up.bias, "down_bias": down.bias}
    expected = reference.experts(hidden, indices, routing, gate_up=merged[0], down=merged[1], **biases, **settings)
    arguments = {"gate_up": gate_up, "down": down, "gate_up_lora": loras[0], "down_lora": loras[1], **settings}
    out = experts(hidden, indices, routing, **arguments)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(experts_fixed_shape(hidden.detach(), indices, routing.detach(), **arguments), expected)
    wanted = (hidden, routing, *factors)
    weight = torch.randn(expected.shape, dtype=F64, generator=generator)
    ours = torch.autograd.grad((out * weight).sum(), wanted)
    theirs = torch.autograd.grad((expected * weight).sum(), wanted)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right)


def test_the_clamp_and_the_interleaving_are_gpt_oss_s() -> None:
    # gate 10 -> 7, up -9 -> -7: (-7 + 1) * 7 * sigmoid(1.702 * 7); gate -10 stays, up 1: 2 * -10 * sigmoid(-17.02)
    gate_up = torch.tensor([[10.0, -9.0, -10.0, 1.0]], dtype=F64)
    expected = torch.tensor([[-42 / (1 + 6.697e-6), -20 / (1 + 2.4643e7)]], dtype=F64)
    torch.testing.assert_close(reference.swiglu(gate_up, alpha=1.702, limit=7.0), expected, rtol=1e-4, atol=1e-12)


@by_triton_and("auto")
def test_the_trainers_norm_and_its_gradient_equal_float64(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 5, 24, generator=generator)
    weight = torch.rand(24, generator=generator)
    doubles = x.to(F64).requires_grad_()
    expected = torch.nn.functional.rms_norm(doubles, (24,), weight.to(F64), 1e-5)
    (right,) = torch.autograd.grad(expected, doubles, grad.to(F64))
    x.requires_grad_()
    found = rms_norm(x, weight, dtype=torch.float32, eps=1e-5, path=path)
    (mine,) = torch.autograd.grad(found, x, grad)
    torch.testing.assert_close(found.to(F64), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mine.to(F64), right, atol=1e-6, rtol=1e-5)
    total = torch.ones_like(x)
    add_rms_norm_grad(x.detach(), weight, grad, total, eps=1e-5, path=path)
    torch.testing.assert_close(total, mine + 1)


@by_triton_and("auto")
def test_a_block_s_output_is_added_rounded_and_normed_at_once(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    before, delta = torch.randn(2, 5, 24, generator=generator)
    weight = torch.rand(24, generator=generator)
    for added in (None, delta, delta.half()):
        stream, rounded = before.clone(), torch.empty(5, 24, dtype=torch.float16)
        normed = advance(stream, added, weight, rounded, eps=1e-5, path=path)
        expected = before if added is None else before + added.float()
        assert torch.equal(stream, expected)
        assert torch.equal(rounded, expected.half())
        right = torch.nn.functional.rms_norm(expected.to(F64), (24,), weight.to(F64), 1e-5)
        assert normed.dtype == torch.float16
        torch.testing.assert_close(normed.to(F64), right, atol=1e-6, rtol=2**-10)


@by_triton_and("auto")
def test_queries_and_keys_are_turned_as_complex_numbers_and_their_gradients_back(
    path: Path,
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(5, 6, 12, generator=generator), torch.randn(5, 3, 12, generator=generator)
    angles = 6 * torch.rand(5, 6, generator=generator)
    grads = torch.randn(5, 6, 12, generator=generator), torch.randn(5, 3, 12, generator=generator)

    def turned(x: Tensor, sign: int) -> Tensor:
        first, second = x.to(F64).chunk(2, dim=-1)
        found = torch.complex(first, second) * torch.polar(torch.ones(5, 6, dtype=F64), sign * angles.to(F64))[:, None]
        return torch.cat((found.real, found.imag), dim=-1)

    pair = query.clone().requires_grad_(), key.clone().requires_grad_()
    found = rotate(*pair, angles.cos(), angles.sin(), path=path)
    backward = torch.autograd.grad(found, pair, [grad.clone() for grad in grads])
    for each, before, of_each, grad in zip(found, (query, key), backward, grads, strict=True):
        torch.testing.assert_close(each.detach().to(F64), turned(before, 1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(of_each.to(F64), turned(grad, -1), atol=1e-5, rtol=1e-5)


@by_triton_and("plain")
def test_token_logprobs_and_their_gradient_equal_the_whole_matrix(path: Literal["plain", "triton"]) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=generator).requires_grad_()
    unembedding = torch.randn(300, 16, generator=generator)
    targets = torch.randint(300, (50,), generator=generator)
    for temperature in (1.0, 0.7):
        doubles = hidden.detach().to(F64).requires_grad_()
        expected, entropy = reference.token_logprobs(doubles, unembedding.to(F64), targets, temperature=temperature)
        weight = torch.randn(50, generator=generator)
        (right,) = torch.autograd.grad((expected * weight).sum(), doubles)
        for tile in (Tile(7, 300), Tile(50, 128), Tile(1000, 512)):
            ours, our_entropy = token_logprobs(
                hidden, unembedding, targets, temperature=temperature, tile=tile, path=path
            )
            torch.testing.assert_close(ours.to(F64), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(our_entropy.to(F64), entropy, atol=1e-5, rtol=1e-5)
            (gradient,) = torch.autograd.grad((ours * weight).sum(), hidden)
            torch.testing.assert_close(gradient.to(F64), right, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="above 0"):
        token_logprobs(hidden, unembedding, targets, temperature=0.0)
