"""Attention with learned sinks, as softmax attention times sigmoid(lse - sink) in float32.

A sink is a logit without a value: it takes its share of each softmax and gives nothing back. Dividing it out afterwards
is exact: exp(s) / (sum exp(s) + exp(sink)) = softmax(s) * sigmoid(lse - sink). So any attention that returns its
log-sum-exp gets sinks for two more operations, differentiable ones, and partial results over pieces of the keys merge
by their lse before the sink is applied (`attend`, `merge`, `apply_sinks`): a group's shared prompt is attended to apart
from each completion.

Covers: plain PyTorch paths with gradients on any device. A GPU's inference has its own: prefill_attention.py
(flex_attention) and decode_attention.py (Triton).
"""

from typing import NamedTuple

import torch
from torch import Tensor

QUERY_CHUNK = 512  # queries whose scores exist at once: 512 x 4 200 keys x 64 heads in float32 is 0.5 GB


class Partial(NamedTuple):
    """Attention over some of the keys: `out` [..., C] is normalised over those alone, `lse` [...] is their log-sum-exp.

    A row that sees no key has lse = -inf and out = 0, and merges as if it were not there.
    """

    out: Tensor
    lse: Tensor  # float32


def attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float, visible: Tensor | None = None) -> Partial:
    """Attention of query [..., T, C] over key and value [..., L, C], without sinks; scores and softmax are float32.

    visible: bool, broadcastable to [..., T, L]; None means all.
    """
    scores = (query @ key.mT).float() * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    largest = scores.detach().amax(-1, keepdim=True)
    exponentials = torch.exp(
        scores - largest.clamp(min=torch.finfo(torch.float32).min)
    )  # a row of -inf must not become NaN
    total = exponentials.sum(-1, keepdim=True)
    out = (exponentials / total.clamp(min=torch.finfo(torch.float32).tiny)).to(value.dtype) @ value
    return Partial(out, (largest + torch.log(total)).squeeze(-1))


def merge(first: Partial, second: Partial) -> Partial:
    """The attention over both sets of keys, from the attention over each."""
    lse = torch.logaddexp(first.lse, second.lse)
    floor = lse.clamp(min=torch.finfo(torch.float32).min)
    share = torch.exp(first.lse - floor).unsqueeze(-1)
    other = torch.exp(second.lse - floor).unsqueeze(-1)
    return Partial((first.out.float() * share + second.out.float() * other).to(first.out.dtype), lse)


def apply_sinks(partial: Partial, sinks: Tensor) -> Tensor:
    """The attention output once each head's sink has taken its share: out * sigmoid(lse - sink).

    sinks broadcasts against `partial.lse`.
    """
    return partial.out * torch.sigmoid(partial.lse - sinks.float()).unsqueeze(-1).to(partial.out.dtype)


def sink_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    *,
    scale: float,
    window: int | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Causal attention with sinks over whole sequences: [B, H, T, C].

    query [B, H, T, C]; key, value [B, K, L, C] with L >= T, the last query being the last key's; sinks [H]; window: how
    many keys a query sees, itself included, None for all before it; key_mask: bool [B, L], False hides padding. Queries
    are taken QUERY_CHUNK at a time, and a windowed chunk reads only the keys it can see. A row that sees nothing gives
    0. Raises ValueError on shapes that do not fit.
    """
    batch, heads, num_queries, channels = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    if heads % kv_heads or key.shape != value.shape or num_keys < num_queries or sinks.shape != (heads,):
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value, sinks))
        raise ValueError(f"shapes of query, key, value and sinks do not fit: {shapes}")
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, num_queries, channels)
    offset = num_keys - num_queries
    outs = []
    for start in range(0, num_queries, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, num_queries)
        first_key = 0 if window is None else max(0, offset + start - window + 1)
        keys = slice(first_key, offset + stop)
        query_at = torch.arange(offset + start, offset + stop, device=query.device)[:, None]
        key_at = torch.arange(first_key, offset + stop, device=query.device)[None, :]
        visible = key_at <= query_at
        if window is not None:
            visible = visible & (key_at > query_at - window)
        if key_mask is not None:
            visible = visible & key_mask[:, None, None, None, keys]
        partial = attend(
            grouped[..., start:stop, :], key[:, :, None, keys], value[:, :, None, keys], scale=scale, visible=visible
        )
        outs.append(apply_sinks(partial, sinks.view(1, kv_heads, -1, 1)))
    return torch.cat(outs, dim=-2).reshape(batch, heads, num_queries, channels)
