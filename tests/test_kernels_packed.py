"""Attention over packed groups against each completion alone behind its own copy of the prompt."""

import pytest
import torch

from stages.kernels import reference
from stages.kernels.packed_attention import Group, packed_attention, segments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KV_HEADS, CHANNELS = 4, 2, 16
CASES = [
    (Group(5, (3, 1, 9)), Group(4), Group(1, (2,))),
    (Group(130, (1, 127, 128, 129)), Group(257, (260,))),
    (Group(300, (40, 700)),),
]
TILED = (Group(130, (1, 127, 129)), Group(70))  # what ends before, at and behind the edge of a tile


def drawn(groups, dtype=torch.float64, seed=0):
    """Query, key, value, sinks and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(group.num_tokens for group in groups)
    sizes = ((tokens, HEADS), (tokens, KV_HEADS), (tokens, KV_HEADS))
    found = [torch.randn(*size, CHANNELS, generator=generator) for size in sizes]
    found += [torch.randn(HEADS, generator=generator), torch.randn(tokens, HEADS, CHANNELS, generator=generator)]
    return [x.to(DEVICE, dtype) for x in found]


def alone(query, key, value, sinks, *, scale, window, groups):
    """The oracle: every completion with its own copy of the prompt, in float64, one sequence at a time."""
    out = [None] * len(query)
    for segment in segments(groups):
        own = range(segment.start, segment.start + segment.length)
        places = [*range(segment.prompt_start, segment.prompt_start + segment.prompt_length), *own]
        visible = reference.causal_window(len(places), len(places), window, query.device)
        rows = (x[places].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        whole = reference.sink_attention(*rows, sinks, scale=scale, visible=visible)[0].transpose(0, 1)
        for place, row in zip(own, whole[-segment.length :], strict=True):
            out[place] = row
    return torch.stack(out)


def with_grads(compute, given, **settings):
    leaves = [x.detach().clone().requires_grad_() for x in given[:4]]
    out = compute(leaves[0], leaves[1], leaves[2], sinks=leaves[3], scale=CHANNELS**-0.5, **settings)
    return [out, *torch.autograd.grad(out, leaves, given[4].to(out.dtype))]


def oracle(given, **settings):
    return with_grads(lambda q, k, v, *, sinks, **rest: alone(q, k, v, sinks, **rest), given, **settings)


@pytest.mark.parametrize("groups", CASES, ids=str)
@pytest.mark.parametrize("window", [None, 128])
def test_packed_completions_and_their_gradients_equal_lone_ones(groups, window):
    given = drawn(groups)
    expected = oracle(given, window=window, groups=groups)
    found = with_grads(packed_attention, given, window=window, groups=groups, path="plain")
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)  # the plain path's softmax is float32


@pytest.mark.parametrize(
    ("window", "groups"),
    [(None, CASES[0]), (None, TILED), (128, TILED), (50, CASES[0]), (50, (Group(200, (40, 200)),))],
    ids=str,
)
def test_the_kernels_and_their_gradients_equal_lone_completions(window, groups):
    given = drawn(groups, torch.float32)
    expected = oracle([x.double() for x in given], window=window, groups=groups)
    found = with_grads(packed_attention, given, window=window, groups=groups, path="triton")
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-5, rtol=1e-5)


def test_shapes_that_do_not_fit_are_refused():
    query, key, value, sinks, _ = drawn((Group(3, (2,)),))
    with pytest.raises(ValueError, match="do not fit 6 tokens"):
        packed_attention(query, key, value, sinks=sinks, scale=1.0, window=None, groups=(Group(3, (3,)),))
    with pytest.raises(ValueError, match="at least 1 token"):
        packed_attention(query, key, value, sinks=sinks, scale=1.0, window=None, groups=(Group(5, (0,)),))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="products in bfloat16 are a card's")
@pytest.mark.parametrize("groups", CASES, ids=str)
@pytest.mark.parametrize("window", [None, 128])
def test_on_a_card_gradients_err_no_more_than_twice_what_plain_bfloat16_does(groups, window):
    given = [x.bfloat16() for x in drawn(groups)]
    expected = oracle([x.double() for x in given], window=window, groups=groups)
    plain = with_grads(packed_attention, given, window=window, groups=groups, path="plain")
    found = with_grads(packed_attention, given, window=window, groups=groups)
    for index, (mine, low, exact) in enumerate(zip(found, plain, expected, strict=True)):
        assert (mine - exact).norm() <= 2 * (low - exact).norm() + 1e-6, index
