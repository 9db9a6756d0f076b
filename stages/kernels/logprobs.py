"""Log-probabilities of given tokens under a large vocabulary, without the [N, V] matrix ever existing whole.

The vocabulary is gone through a tile at a time, in forward and again in backward: largest logit, sum of exponentials
and entropy are carried along, as online softmax does (Milakov and Gimelshein 2018); no logits are kept. Source of the
idea for training: chunked cross-entropy (Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models").
"""

from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor


class Unembedding(Protocol):
    """A matrix [V, D] whose rows can be had some at a time: a tensor, or what unpacks them (stages/model/nf4.py)."""

    @property
    def shape(self) -> Any: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


class Tile(NamedTuple):
    """Of logits in float32 at once."""

    rows: int
    columns: int


TILE = Tile(4096, 8192)  # 134 MB


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, unembedding, targets, temperature, tile, triton):
        num_rows = hidden.shape[0]
        largest = torch.full((num_rows,), -torch.inf, dtype=torch.float32, device=hidden.device)
        total, weighted, chosen = (torch.zeros_like(largest) for _ in range(3))
        for rows, columns in _tiles(num_rows, unembedding.shape[0], tile):
            logits = _logits(hidden[rows], unembedding[columns])
            running = [x[rows] for x in (largest, total, weighted, chosen)]
            _accumulate(logits, targets[rows], columns.start, temperature, *running, triton=triton)
        normalizers = largest + total.log()
        entropy = normalizers - weighted / total
        ctx.save_for_backward(hidden, targets, normalizers)
        ctx.unembedding, ctx.temperature, ctx.tile, ctx.triton = unembedding, temperature, tile, triton
        ctx.mark_non_differentiable(entropy)
        return chosen - normalizers, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, _grad_entropy):
        hidden, targets, normalizers = ctx.saved_tensors
        unembedding = ctx.unembedding
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for rows, columns in _tiles(hidden.shape[0], unembedding.shape[0], ctx.tile):
            weight = unembedding[columns]
            logits = _logits(hidden[rows], weight)
            grad_logits = _grad_of_logits(
                logits,
                targets[rows],
                columns.start,
                ctx.temperature,
                normalizers[rows],
                grad_logprobs[rows].contiguous(),
                dtype=hidden.dtype,
                triton=ctx.triton,
            )
            del logits
            grad_hidden[rows] += _logits(grad_logits, weight.mT)
        return grad_hidden.to(hidden.dtype), None, None, None, None, None


def token_logprobs(
    hidden: Tensor,
    unembedding: Unembedding,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    tile: Tile = TILE,
    path: Literal["auto", "triton", "plain"] = "auto",
) -> tuple[Tensor, Tensor]:
    """Natural log-probability float32 [N] of each target, and the entropy float32 [N], in nats, of its distribution.

    hidden [N, D]; unembedding [V, D], frozen: no gradient reaches it; targets int64 [N]; logits are divided by
    `temperature`. Gradients flow through the log-probabilities, not through the entropy. Memory: a tile of logits and
    of their gradient, and hidden's gradient in float32. Raises ValueError on a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"log-probabilities need a temperature above 0, got {temperature}")
    triton = hidden.is_cuda if path == "auto" else path == "triton"
    logprobs, entropy = _TokenLogprobs.apply(hidden, unembedding, targets, temperature, tile, triton)
    return logprobs, entropy


def _tiles(num_rows: int, num_columns: int, tile: Tile) -> list[tuple[slice, slice]]:
    return [
        (slice(row, min(row + tile.rows, num_rows)), slice(column, min(column + tile.columns, num_columns)))
        for row in range(0, num_rows, tile.rows)
        for column in range(0, num_columns, tile.columns)
    ]


def _logits(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [n, K] @ weight [M, K].T in float32."""
    if rows.is_cuda and rows.dtype != torch.float32:
        return torch.mm(rows, weight.mT, out_dtype=torch.float32)
    return (rows @ weight.mT).float()


def _accumulate(
    logits: Tensor,
    targets: Tensor,
    first: int,
    temperature: float,
    largest: Tensor,
    total: Tensor,
    weighted: Tensor,
    chosen: Tensor,
    *,
    triton: bool,
) -> None:
    """Adds a tile's columns, the vocabulary's from `first` on, to the four running figures of its rows, in place."""
    if triton:
        from stages.kernels.triton_logprobs import accumulate_kernel

        accumulate_kernel[(logits.shape[0],)](
            logits, targets, largest, total, weighted, chosen, logits.shape[1], first, 1 / temperature,
            BLOCK=2048, num_warps=8,
        )  # fmt: skip
        return
    logits.div_(temperature)
    highest = torch.maximum(largest, logits.amax(-1))
    exponentials = torch.exp(logits - highest[:, None])
    shrink = torch.exp(largest - highest)
    total.mul_(shrink).add_(exponentials.sum(-1))
    weighted.mul_(shrink).add_(exponentials.mul_(logits).sum(-1))
    largest.copy_(highest)
    at = targets - first
    here = (at >= 0) & (at < logits.shape[1])
    found = logits.gather(-1, at.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(-1)
    chosen.copy_(torch.where(here, found, chosen))


def _grad_of_logits(
    logits: Tensor,
    targets: Tensor,
    first: int,
    temperature: float,
    normalizers: Tensor,
    grad: Tensor,
    *,
    dtype: torch.dtype,
    triton: bool,
) -> Tensor:
    """The gradient [n, M] in `dtype` of a tile of undivided logits; `logits` is used up."""
    if triton:
        from stages.kernels.triton_logprobs import gradient_kernel

        out = torch.empty(logits.shape, dtype=dtype, device=logits.device)
        gradient_kernel[(logits.shape[0],)](
            logits, targets, normalizers, grad, out, logits.shape[1], first, 1 / temperature, BLOCK=2048, num_warps=8
        )
        return out
    found = logits.div_(temperature).sub_(normalizers[:, None]).exp_().neg_()
    at = targets - first
    here = ((at >= 0) & (at < found.shape[1])).to(found.dtype)
    found.scatter_add_(-1, at.clamp(0, found.shape[1] - 1)[:, None], here[:, None])
    return found.mul_(grad[:, None] / temperature).to(dtype)
