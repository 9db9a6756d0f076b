"""Attention for training: completions packed without padding beside the prompt that they share, with sinks and windows,
forward and backward.

A pack is groups one after the other, each a prompt's tokens and then every completion's. A prompt's query sees the
prompt up to itself; a completion's sees the whole prompt and its own tokens up to itself, as if each completion stood
alone behind its prompt. So the prompt is computed once for all of them, and its gradient is the sum of theirs.

On a GPU it is kernels of our own (triton_packed_attention.py), which go over just what a segment sees, without padding,
and nothing is compiled for a length. On one H200 compiled flex_attention took 2 to 6 times as long on such packs. On a
CPU it is the plain path, group by group.

Shapes: T tokens of the pack, H query heads, K key/value heads, C channels.
"""

import functools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.kernels.attention import sink_attention
from stages.kernels.launch import applied
from stages.kernels.transfer import upload

TABLES_KEPT = 4


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


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sinks: Tensor,
    scale: float,
    window: int | None,
    groups: Groups,
    path: Literal["auto", "triton", "plain"] = "auto",
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
    out: Tensor = applied(_Packed, query, key, value, sinks, scale, window or 0, groups)
    return out


class Blocks(NamedTuple):
    """Of a kernel: tile sizes, and how it is launched."""

    queries: int
    keys: int
    warps: int
    stages: int


# Measured on one H200 with gpt-oss-20b's heads and 4 096 tokens.
FORWARD = Blocks(128, 64, 4, 3)
QUERY_GRADIENT = Blocks(64, 64, 4, 2)
KEY_GRADIENT = Blocks(32, 64, 4, 3)


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


@functools.lru_cache(maxsize=TABLES_KEPT)
def tables_of(groups: Groups, device: torch.device) -> Tables:
    """The pack's segments, and the tiles of each kernel, those with the longest way to go first."""
    every = list(segments(groups))
    rows = []
    for index, segment in enumerate(every):
        last = index + 1
        while not segment.prompt_length and last < len(every) and every[last].prompt_length:
            last += 1
        rows.append([*segment, index + 1, last])

    def tiles(size: int) -> list[tuple[int, int]]:
        return [(index, at) for index, segment in enumerate(every) for at in range(0, segment.length, size)]

    made = (
        rows,
        tiles(FORWARD.queries)[::-1],
        tiles(QUERY_GRADIENT.queries)[::-1],
        tiles(KEY_GRADIENT.keys),
    )
    return Tables(*(upload(table, torch.int32, device) for table in made))


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
