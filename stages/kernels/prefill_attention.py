"""Attention of whole prompts, with sinks: several prompts packed without padding, or a chunk of one long prompt.

On a GPU it is flex_attention (Dong et al. 2024), compiled once for every length: lengths are marked dynamic and padded
to the mask's blocks, and what tells prompts apart lies in tensors. Which blocks of keys a block of queries sees is
worked out from the lengths, not by trying every pair, and kept for the layers and chunks that follow. On a CPU it is
the plain path of kernels/attention.py, prompt by prompt.

No gradients yet. Shapes: T queries, L keys, H query heads, K key/value heads, C channels.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental import _config as shape_config
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from stages.kernels.attention import sink_attention

BLOCK = 128  # queries and keys of a block of the mask
LEAST = 2 * BLOCK  # a dimension of one block would be compiled for apart
MASKS_KEPT = 16


class PackedDocs(NamedTuple):
    """Which prompt each query belongs to.

    Example: PackedDocs((500, 3)) is two prompts of 500 and 3 tokens, 503 queries and keys; PackedDocs((4096,),
    past=8192) is tokens 8192 ... 12287 of one prompt, 4 096 queries and 12 288 keys.
    """

    lengths: tuple[int, ...]  # queries of each prompt, in their order
    past: int = 0  # keys before the first query's own; only with one prompt

    @property
    def num_queries(self) -> int:
        return sum(self.lengths)

    @property
    def num_keys(self) -> int:
        return self.past + self.num_queries


class Mask(NamedTuple):
    """A document mask in tensors: query i sees keys first[i] ... last[i]; the lists are those of a BlockMask, int32."""

    first: Tensor  # [T], T and L padded to blocks
    last: Tensor  # [T]
    num_partial: Tensor  # [1, 1, T / BLOCK]
    partial: Tensor  # [1, 1, T / BLOCK, L / BLOCK], the first num_partial of each row count
    num_full: Tensor
    full: Tensor


def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sinks: Tensor,
    scale: float,
    window: int | None,
    docs: PackedDocs,
    path: Literal["auto", "flex", "plain"] = "auto",
) -> Tensor:
    """Causal attention with sinks within each prompt: [T, H, C].

    query [T, H, C]; key, value [L, K, C], L = T + docs.past, all with RoPE applied; sinks [H]; window: how many keys a
    query sees, itself included, None for all before it. Raises ValueError on shapes that do not fit.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    if not docs.lengths or min(docs.lengths) < 1 or docs.past < 0 or (docs.past and len(docs.lengths) > 1):
        raise ValueError(f"{docs}: prompts have at least 1 token, and past keys go with one prompt only")
    if query.shape[0] != docs.num_queries or key.shape[0] != docs.num_keys:
        wanted = f"{docs.num_queries} queries and {docs.num_keys} keys"
        raise ValueError(f"{query.shape[0]} queries and {key.shape[0]} keys given, the prompts have {wanted}")
    if heads % kv_heads or key.shape != value.shape or sinks.shape != (heads,) or query.shape[2] != key.shape[2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value, sinks))
        raise ValueError(f"shapes of query, key, value and sinks do not fit: {shapes}")
    if path == "auto":
        path = "flex" if query.is_cuda else "plain"
    with torch.no_grad():
        if path == "plain":
            return _plain(query, key, value, sinks, scale=scale, window=window, docs=docs)
        return _attend(query, key, value, sinks, scale=scale, window=window, docs=docs, compiled=query.is_cuda)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    *,
    scale: float,
    window: int | None,
    docs: PackedDocs,
    compiled: bool,
) -> Tensor:
    mask = mask_of(docs, window, query.device)
    num_queries, num_keys = mask.first.shape[0], mask.partial.shape[3] * BLOCK
    length = query.shape[0]
    query, key, value = _padded(query, num_queries), _padded(key, num_keys), _padded(value, num_keys)
    if not compiled:
        return _flex(query, key, value, sinks.detach(), mask, scale)[:length]
    for tensor in (query, key, value, mask.first, mask.last):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    for tensor in mask[2:]:
        torch._dynamo.maybe_mark_dynamic(tensor, 2)
    for tensor in (mask.partial, mask.full):
        torch._dynamo.maybe_mark_dynamic(tensor, 3)
    # Else as many queries as keys in the first call would mean a second compilation for a chunk, where they differ.
    with shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        return _compiled()(query, key, value, sinks.detach(), mask, scale)[:length]


def _padded(x: Tensor, length: int) -> Tensor:
    """x [N, heads, C] as contiguous [length, heads, C], zeros at its end."""
    x = x.detach()
    return x.contiguous() if x.shape[0] == length else F.pad(x, (0, 0, 0, 0, 0, length - x.shape[0]))


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_flex, fullgraph=True)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    mask: Mask,
    scale: float,
) -> Tensor:
    first, last = mask.first, mask.last

    def visible(_batch: Tensor, _head: Tensor, query_at: Tensor, key_at: Tensor) -> Tensor:
        return (key_at >= first[query_at]) & (key_at <= last[query_at])

    block_mask = BlockMask.from_kv_blocks(
        mask.num_partial,
        mask.partial,
        mask.num_full,
        mask.full,
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(query.shape[0], key.shape[0]),
        compute_q_blocks=False,
    )
    out, aux = flex_attention(
        query.transpose(0, 1).unsqueeze(0),
        key.transpose(0, 1).unsqueeze(0),
        value.transpose(0, 1).unsqueeze(0),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    share = torch.sigmoid(aux.lse.float() - sinks.float()[:, None])  # [1, H, T]
    return (out.float() * share.unsqueeze(-1)).to(out.dtype)[0].transpose(0, 1)


@functools.lru_cache(maxsize=MASKS_KEPT)
def mask_of(docs: PackedDocs, window: int | None, device: torch.device) -> Mask:
    """The mask of `docs` on `device`. Padding queries see what the last query sees."""
    num_queries, num_keys = (max(LEAST, -(-n // BLOCK) * BLOCK) for n in (docs.num_queries, docs.num_keys))
    lengths = torch.tensor(docs.lengths)
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    query_at = torch.arange(num_queries).clamp(max=docs.num_queries - 1)
    last = query_at + docs.past
    first = starts[query_at]
    if window is not None:
        first = torch.maximum(first, last - window + 1)

    # Both ends rise with the query. So a block of queries sees blocks begin ... end - 1, and all of them see the whole
    # of blocks inner_begin ... inner_end - 1.
    first_of, last_of = first.view(-1, BLOCK), last.view(-1, BLOCK)
    begin, end = first_of[:, 0] // BLOCK, last_of[:, -1] // BLOCK + 1
    inner_begin = -(-first_of[:, -1] // BLOCK)
    inner_end = torch.maximum((last_of[:, 0] + 1) // BLOCK, inner_begin)
    inner_begin, inner_end = inner_begin.clamp(max=end), inner_end.clamp(max=end)
    order = torch.arange(num_keys // BLOCK)
    before = (inner_begin - begin)[:, None]
    partial = torch.where(order < before, begin[:, None] + order, inner_end[:, None] + order - before)
    full = inner_begin[:, None] + order
    num_full = inner_end - inner_begin
    parts = (
        first,
        last,
        (end - begin - num_full)[None, None],
        partial.clamp(max=len(order) - 1)[None, None],
        num_full[None, None],
        full.clamp(max=len(order) - 1)[None, None],
    )
    return Mask(*(x.to(torch.int32).contiguous().to(device) for x in parts))


def _plain(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, *, scale: float, window: int | None, docs: PackedDocs
) -> Tensor:
    outs = []
    start = 0
    for length in docs.lengths:
        stop = start + length
        keys = slice(0, docs.num_keys) if docs.past else slice(start, stop)
        own = [x.transpose(0, 1).unsqueeze(0) for x in (query[start:stop], key[keys], value[keys])]
        out = sink_attention(own[0], own[1], own[2], sinks, scale=scale, window=window)
        outs.append(out[0].transpose(0, 1))
        start = stop
    return torch.cat(outs)
