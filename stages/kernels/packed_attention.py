"""Attention for training: completions packed without padding beside the prompt that they share, with sinks and windows,
forward and backward.

A pack is groups one after the other, each a prompt's tokens and then every completion's. A prompt's query sees the
prompt up to itself; a completion's sees the whole prompt and its own tokens up to itself, as if each completion stood
alone behind its prompt. So the prompt is computed once for all of them, and its gradient is the sum of theirs.

On a GPU it is flex_attention (Dong et al. 2024), forward and backward compiled once for every length, as in
prefill_attention.py: for the kernel every prompt and completion begins a block, and which blocks see which is worked
out from the lengths. Sinks are two operations on its log-sum-exp (attention.py), through which gradients flow. On a CPU
it is the plain path, group by group.

Shapes: T tokens of the pack, H query heads, K key/value heads, C channels.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental import _config as shape_config
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from stages.kernels.attention import sink_attention

BLOCK = 128
MASKS_KEPT = 4


class Group(NamedTuple):
    """Tokens of a prompt, and of each completion behind it.

    Example: Group(200, (310, 95)) is 605 tokens in a pack.
    """

    prompt: int
    completions: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.prompt + sum(self.completions)


Groups = tuple[Group, ...]


class Segment(NamedTuple):
    """A prompt or a completion: where its tokens lie in the pack, and those of the prompt it follows."""

    start: int
    length: int
    prompt_start: int
    prompt_length: int  # 0 for a prompt itself


class Mask(NamedTuple):
    """What each query sees, in the kernel's order, where every segment begins a block: its own keys first ... last and
    the prompt's prompt_first ... prompt_last; int32. The lists are those of a BlockMask, of blocks seen in part (some)
    and as a whole (full), by query and by key.
    """

    first: Tensor  # [padded T]
    last: Tensor
    prompt_first: Tensor
    prompt_last: Tensor
    num_some: Tensor  # [1, 1, T / BLOCK]
    some: Tensor  # [1, 1, T / BLOCK, T / BLOCK]
    num_full: Tensor
    full: Tensor
    num_some_queries: Tensor
    some_queries: Tensor
    num_full_queries: Tensor
    full_queries: Tensor


class Layout(NamedTuple):
    """Where the pack's tokens lie in the kernel's order; int64."""

    sources: Tensor  # [padded T], a segment's last token in the padding after it
    places: Tensor  # [T]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sinks: Tensor,
    scale: float,
    window: int | None,
    groups: Groups,
    path: Literal["auto", "triton", "flex", "plain"] = "auto",
) -> Tensor:
    """[T, H, C], differentiable in query [T, H, C], key and value [T, K, C] and sinks [H]; RoPE is applied already.

    window: how many keys a query sees, itself included, None for all. Raises ValueError on shapes that do not fit.
    """
    tokens = sum(group.num_tokens for group in groups)
    if any(group.prompt < 1 or min(group.completions, default=1) < 1 for group in groups):
        raise ValueError(f"{groups}: prompts and completions have at least 1 token")
    shapes = query.shape[0] == key.shape[0] == tokens and key.shape == value.shape
    if not shapes or query.shape[1] % key.shape[1] or sinks.shape != query.shape[1:2]:
        sizes = ", ".join(str(tuple(x.shape)) for x in (query, key, value, sinks))
        raise ValueError(f"shapes of query, key, value and sinks do not fit {tokens} tokens: {sizes}")
    if path == "auto":
        path = "triton" if query.is_cuda else "plain"
    if path == "plain":
        return _plain(query, key, value, sinks, scale=scale, window=window, groups=groups)
    if path == "triton":
        found: Tensor = _Packed.apply(query, key, value, sinks, scale, window or 0, groups)
        return found
    mask, layout = mask_of(groups, window, query.device), layout_of(groups, query.device)
    padded = mask.first.shape[0]
    if layout is None:
        query, key, value = (
            F.pad(x, (0, 0, 0, 0, 0, padded - tokens)) if padded > tokens else x for x in (query, key, value)
        )
        return _compiled_flex(query, key, value, sinks, mask, scale)[:tokens]
    query, key, value = (_Gather.apply(x, layout.sources, layout.places) for x in (query, key, value))
    out: Tensor = _Scatter.apply(_compiled_flex(query, key, value, sinks, mask, scale), layout.places)
    return out


class Blocks(NamedTuple):
    """Of a kernel: tile sizes, and how it is launched."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD = Blocks(128, 64, 4, 3)
QUERY_GRADIENT = Blocks(128, 64, 8, 3)
KEY_GRADIENT = Blocks(64, 128, 8, 3)


class Tables(NamedTuple):
    """What the kernels are told of the pack; int32 (triton_packed_attention.py)."""

    segments: Tensor  # [S, 6]
    forward_tiles: Tensor  # [n, 2]
    query_tiles: Tensor
    key_tiles: Tensor


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, scale, window, groups):
        from stages.kernels.triton_packed_attention import forward_kernel

        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        tokens, heads, channels = query.shape
        tables = tables_of(groups, query.device)
        out = torch.empty_like(query)
        normalizers = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
        ctx.sizes = {"H": heads, "K": key.shape[1], "C": channels, "WINDOW": window}
        ctx.scale = scale * math.log2(math.e)
        forward_kernel[(heads, len(tables.forward_tiles))](
            query, key, value, sinks, tables.segments, tables.forward_tiles, out, normalizers, tokens, ctx.scale,
            **ctx.sizes, **_launch(FORWARD),
        )  # fmt: skip
        ctx.tables = tables
        ctx.save_for_backward(query, key, value, sinks, out, normalizers)
        return out

    @staticmethod
    def backward(ctx, grad):
        from stages.kernels.triton_packed_attention import (
            key_gradient_kernel,
            query_gradient_kernel,
            share_kernel,
        )

        query, key, value, sinks, out, normalizers = ctx.saved_tensors
        grad, tables = grad.contiguous(), ctx.tables
        tokens, heads, channels = query.shape
        shares = torch.empty_like(normalizers)
        share_kernel[(heads, -(-tokens // 64))](out, grad, shares, tokens, H=heads, C=channels, TOKENS=64)
        of_query, of_key, of_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        given = (query, key, value, grad, normalizers, shares, tables.segments)
        key_gradient_kernel[(key.shape[1], len(tables.key_tiles))](
            *given, tables.key_tiles, of_key, of_value, tokens, ctx.scale, **ctx.sizes, **_launch(KEY_GRADIENT)
        )
        query_gradient_kernel[(heads, len(tables.query_tiles))](
            *given, tables.query_tiles, of_query, tokens, ctx.scale, **ctx.sizes, **_launch(QUERY_GRADIENT)
        )
        of_sinks = None
        if ctx.needs_input_grad[3]:  # a sink takes its part of the weights and gives no value
            parts = torch.exp2(sinks.float()[:, None] * math.log2(math.e) - normalizers)
            of_sinks = -(parts * shares).sum(1).to(sinks.dtype)
        return of_query, of_key, of_value, of_sinks, None, None, None


def _launch(blocks: Blocks) -> dict[str, int]:
    return {"QUERIES": blocks.queries, "KEYS": blocks.keys, "num_warps": blocks.warps, "num_stages": blocks.stages}


@functools.lru_cache(maxsize=MASKS_KEPT)
def tables_of(groups: Groups, device: torch.device) -> Tables:
    """The pack's segments, and the tiles of each kernel, those with the longest way to go first."""
    rows: list[list[int]] = []
    for group in groups:
        at = len(rows)
        prompt = rows[-1][0] + rows[-1][1] if rows else 0
        rows.append([prompt, group.prompt, prompt, 0, at + 1, at + 1 + len(group.completions)])
        for length in group.completions:
            rows.append([rows[-1][0] + rows[-1][1], length, prompt, group.prompt, at, at])
    lengths = [row[1] for row in rows]

    def tiles(size: int) -> Tensor:
        found = [(index, at) for index, length in enumerate(lengths) for at in range(0, length, size)]
        return torch.tensor(found, dtype=torch.int32)

    by_queries = {size: tiles(size).flip(0) for size in (FORWARD.queries, QUERY_GRADIENT.queries)}
    made = (
        torch.tensor(rows, dtype=torch.int32),
        by_queries[FORWARD.queries],
        by_queries[QUERY_GRADIENT.queries],
        tiles(KEY_GRADIENT.keys),
    )
    return Tables(*(table.to(device).contiguous() for table in made))


class _Gather(torch.autograd.Function):
    """Rows in the kernel's order. The padding repeats rows; no gradient comes back from it."""

    @staticmethod
    def forward(ctx, x, sources, places):
        ctx.places = places
        return x.index_select(0, sources)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.places), None, None


class _Scatter(torch.autograd.Function):
    """Rows back in the pack's order; the gradient of the padding is zero."""

    @staticmethod
    def forward(ctx, x, places):
        ctx.places, ctx.length = places, x.shape[0]
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_zeros(ctx.length, *grad.shape[1:])
        out[ctx.places] = grad
        return out, None


def _compiled_flex(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, mask: Mask, scale: float) -> Tensor:
    if not query.is_cuda:
        return _flex(query, key, value, sinks, mask, scale)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    for tensor in (query, key, value, *mask[:4]):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    for tensor in mask[4:]:
        torch._dynamo.maybe_mark_dynamic(tensor, 2)
    for tensor in mask[5::2]:
        torch._dynamo.maybe_mark_dynamic(tensor, 3)
    with shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        return _compiled()(query, key, value, sinks, mask, scale)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_flex, fullgraph=True)


def _flex(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, mask: Mask, scale: float) -> Tensor:
    first, last, prompt_first, prompt_last = mask.first, mask.last, mask.prompt_first, mask.prompt_last

    def visible(_batch: Tensor, _head: Tensor, query_at: Tensor, key_at: Tensor) -> Tensor:
        own = (key_at >= first[query_at]) & (key_at <= last[query_at])
        return own | ((key_at >= prompt_first[query_at]) & (key_at <= prompt_last[query_at]))

    block_mask = BlockMask(
        seq_lengths=(query.shape[0], key.shape[0]),
        kv_num_blocks=mask.num_some,
        kv_indices=mask.some,
        full_kv_num_blocks=mask.num_full,
        full_kv_indices=mask.full,
        q_num_blocks=mask.num_some_queries,
        q_indices=mask.some_queries,
        full_q_num_blocks=mask.num_full_queries,
        full_q_indices=mask.full_queries,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
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


def segments(groups: Groups) -> Iterator[Segment]:
    """The pack's prompts and completions in their order."""
    start = 0
    for group in groups:
        prompt = start
        yield Segment(start, group.prompt, start, 0)
        start += group.prompt
        for length in group.completions:
            yield Segment(start, length, prompt, group.prompt)
            start += length


def _blocks(length: int) -> int:
    return -(-length // BLOCK)


@functools.lru_cache(maxsize=MASKS_KEPT)
def layout_of(groups: Groups, device: torch.device) -> Layout | None:
    """The kernel's order; None where it is the pack's own, with padding at the end alone."""
    every = list(segments(groups))
    if not any(segment.length % BLOCK for segment in every[:-1]):
        return None
    sources, places, begin = [], [], 0
    for segment in every:
        room = _blocks(segment.length) * BLOCK
        sources.append(segment.start + torch.arange(room).clamp(max=segment.length - 1))
        places.append(begin + torch.arange(segment.length))
        begin += room
    sources += [sources[-1][-1:].expand(max(0, 2 * BLOCK - begin))]
    return Layout(torch.cat(sources).to(device), torch.cat(places).to(device))


@functools.lru_cache(maxsize=2 * MASKS_KEPT)
def mask_of(groups: Groups, window: int | None, device: torch.device) -> Mask:
    """What each query of the pack sees; at least two blocks, since one would be compiled for apart. Padding sees what
    the last query of its segment sees.
    """
    begin_of: dict[int, int] = {}  # where a prompt begins in the kernel's order, by its start
    parts: list[list[Tensor]] = []
    begin = 0
    every = list(segments(groups))
    for index, segment in enumerate(every):
        room = _blocks(segment.length) * BLOCK
        if index == len(every) - 1:
            room = max(room, 2 * BLOCK - begin)
        within = torch.arange(room).clamp(max=segment.length - 1)
        begin_of.setdefault(segment.start, begin)
        prompt = begin_of[segment.prompt_start]
        first, last = torch.zeros_like(within), within
        prompt_first = torch.zeros_like(within)
        if window is not None:
            first = (within - window + 1).clamp(min=0)
            prompt_first = (within + segment.prompt_length - window + 1).clamp(min=0)
        prompt_last = torch.full_like(within, prompt + segment.prompt_length - 1)
        parts.append([begin + first, begin + last, prompt + prompt_first, prompt_last])
        begin += room
    ranges = [torch.cat(column).to(device, torch.int32) for column in zip(*parts, strict=True)]
    own = _block_ranges(ranges[0], ranges[1])
    prompt_own = _block_ranges(ranges[2], ranges[3])
    order = torch.arange(begin // BLOCK, dtype=torch.int32, device=device)
    seen, full = (
        _between(order, own[k], own[k + 1]) | _between(order, prompt_own[k], prompt_own[k + 1]) for k in (0, 2)
    )
    some = seen & ~full
    lists: list[Tensor] = []
    for matrix in (some, full, some.T, full.T):
        lists.append(matrix.sum(1, dtype=torch.int32)[None, None])
        lists.append(matrix.to(torch.uint8).argsort(dim=1, descending=True, stable=True).to(torch.int32)[None, None])
    return Mask(*ranges, *(x.contiguous() for x in lists))


def _between(order: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    return (order >= begin[:, None]) & (order < end[:, None])


def _block_ranges(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each block of queries: the blocks begin ... end - 1 of keys that one of them sees, and those that all see
    whole. Both ends of what a query sees rise within a block; an empty range has first > last.
    """
    first, last = first.view(-1, BLOCK), last.view(-1, BLOCK)
    nothing = first[:, 0] > last[:, -1]
    begin, end = first[:, 0] // BLOCK, last[:, -1] // BLOCK + 1
    inner_begin, inner_end = -(-first[:, -1] // BLOCK), (last[:, 0] + 1) // BLOCK
    zero = torch.zeros_like(begin)
    return (
        begin,
        torch.where(nothing, zero, end),
        inner_begin,
        torch.where(nothing, zero, torch.minimum(inner_end, end)),
    )


def _plain(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, *, scale: float, window: int | None, groups: Groups
) -> Tensor:
    """Each prompt, then its completions as one batch, padded behind, where no query that counts looks."""
    outs = []
    start = 0
    for group in groups:
        prompt = slice(start, start + group.prompt)
        own = [x[prompt].transpose(0, 1).unsqueeze(0) for x in (query, key, value)]
        out = sink_attention(own[0], own[1], own[2], sinks, scale=scale, window=window)
        outs.append(out[0].transpose(0, 1))
        start += group.prompt
        if not group.completions:
            continue
        stop = start + sum(group.completions)
        longest = max(group.completions)
        rows = [
            torch.stack(
                [F.pad(row, (0, 0, 0, 0, 0, longest - row.shape[0])) for row in x[start:stop].split(group.completions)]
            )
            for x in (query, key, value)
        ]  # [G, longest, heads, C]
        behind = [
            torch.cat((before.expand(len(group.completions), -1, -1, -1), row.transpose(1, 2)), dim=2)
            for before, row in zip(own[1:], rows[1:], strict=True)
        ]
        out = sink_attention(rows[0].transpose(1, 2), behind[0], behind[1], sinks, scale=scale, window=window)
        outs += [row[:, :length].transpose(0, 1) for row, length in zip(out, group.completions, strict=True)]
        start = stop
    return torch.cat(outs)
