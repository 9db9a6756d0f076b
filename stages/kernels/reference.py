"""Plain PyTorch versions of every kernel, written for reading: the oracles of the tests. Nothing here is fast.

Shapes as in the package's docstring. Run them in float64 to judge an error, in bfloat16 to learn what error is
unavoidable.
"""

import torch
from torch import Tensor


def sink_attention(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, *, scale: float, visible: Tensor
) -> Tensor:
    """Attention [B, H, T, C] whose softmax has one more column, the head's sink, which carries no value.

    query [B, H, T, C]; key, value [B, K, L, C]; sinks [H]; visible bool, broadcastable to [B, H, T, L]. As in
    github.com/openai/gpt-oss, gpt_oss/torch/model.py.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.mT * scale).masked_fill(~visible, -torch.inf)
    sink_column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sink_column), dim=-1).softmax(-1)[..., :-1] @ value


def causal_window(num_queries: int, num_keys: int, window: int | None, device: torch.device | str = "cpu") -> Tensor:
    """Visible keys, bool [T, L]: the last query is the last key's; a window counts the query itself."""
    query_at = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_at = torch.arange(num_keys, device=device)[None, :]
    visible = key_at <= query_at
    return visible if window is None else visible & (key_at > query_at - window)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [..., C] by cos, sin [..., C / 2]: the first half of the channels against the second."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def decode_attention(
    qkv: Tensor,
    *,
    sinks: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    positions: Tensor,
    page_table: Tensor | None,
    scale: float,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, Tensor, float] | None = None,
) -> Tensor:
    """One new token of each row against its cached keys, one row at a time: see kernels/decode_attention.py, which has
    the same arguments. All arithmetic is in qkv's dtype; keys and values are written to.
    """
    heads, kv_heads, page, channels = sinks.shape[0], *keys.shape[1:]
    sizes = [heads * channels, kv_heads * channels, kv_heads * channels]
    projections = list(qkv[:, : sum(sizes)].split(sizes, dim=-1))
    if bias is not None:
        projections = [x + b.to(x.dtype) for x, b in zip(projections, bias.split(sizes), strict=True)]
    if lora is not None:
        inner = qkv[:, sum(sizes) :].chunk(3, dim=-1)
        projections = [
            x + t @ factor.mT.to(x.dtype) * lora[3] for x, t, factor in zip(projections, inner, lora[:3], strict=True)
        ]
    queries, new_keys, new_values = (x.unflatten(-1, (-1, channels)) for x in projections)
    outs = []
    for query, key, value, slot in zip(queries, new_keys, new_values, rows.tolist(), strict=True):
        position = int(positions[slot])
        turn = cos[position].to(qkv.dtype), sin[position].to(qkv.dtype)
        oldest = 0 if page_table is not None else max(0, position - page + 1)
        seen = torch.arange(oldest, position + 1, device=keys.device)
        pages = torch.full_like(seen, slot) if page_table is None else page_table[slot, seen // page].long()
        keys[pages[-1], :, position % page] = rotate(key, *turn).to(keys.dtype)
        values[pages[-1], :, position % page] = value.to(values.dtype)
        seen_keys, seen_values = (cache[pages, :, seen % page].transpose(0, 1)[None] for cache in (keys, values))
        visible = torch.ones(1, len(seen), dtype=torch.bool, device=keys.device)
        attended = sink_attention(
            rotate(query, *turn)[None, :, None], seen_keys, seen_values, sinks, scale=scale, visible=visible
        )
        outs.append(attended[0, :, 0].flatten())
    return torch.stack(outs)


def swiglu(gate_up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """gpt-oss's clamped SwiGLU [..., F] of gate_up [..., 2F]: even columns are gates, odd columns are ups."""
    gate, up = gate_up[..., 0::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def experts(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    gate_up: Tensor,
    gate_up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    alpha: float,
    limit: float,
) -> Tensor:
    """The weighted sum [N, D] of each token's chosen experts, one token and one expert at a time.

    hidden [N, D]; indices, weights [N, k]; gate_up [E, D, 2F], down [E, F, D] and their biases [E, 2F], [E, D]. LoRA is
    added to gate_up and down by the caller: W + scale * A^T B^T.
    """
    rows = []
    for token, chosen, routing in zip(hidden, indices.tolist(), weights, strict=True):
        total = torch.zeros_like(token)
        for expert, weight in zip(chosen, routing, strict=True):
            inner = swiglu(token @ gate_up[expert] + gate_up_bias[expert], alpha=alpha, limit=limit)
            total = total + weight * (inner @ down[expert] + down_bias[expert])
        rows.append(total)
    return torch.stack(rows)


def token_logprobs(
    hidden: Tensor, unembedding: Tensor, targets: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Natural log-probability [N] of each target, and the entropy [N] of its distribution, from the whole [N, V]
    matrix.
    """
    logprobs = (hidden @ unembedding.mT / temperature).log_softmax(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)
