"""Log-probabilities of given tokens under a large vocabulary, without the [N, V] matrix ever existing whole.

The vocabulary is gone through a tile at a time, once: largest logit, sum of exponentials, entropy and the gradient's
direction are carried along, as online softmax does (Milakov and Gimelshein 2018); no logits are kept. Source of the
idea for training: chunked cross-entropy (Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models").
"""

from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from stages.kernels.launch import slices


class Unembedding(Protocol):
    """A matrix [V, D] whose rows are unpacked some at a time (stages/model/nf4.py)."""

    @property
    def shape(self) -> Any: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...

    def rows(self, indices: Tensor, /) -> Tensor: ...


class Tile(NamedTuple):
    """Of logits in float32 at once."""

    rows: int
    columns: int


TILE = Tile(4096, 8192)  # 134 MB, and 67 MB of exponentials in 16 bits


class _TokenLogprobs(torch.autograd.Function):
    """Where hidden needs a gradient, the mean row of the unembedding under each token's softmax is carried along too:
    the gradient is the target's row less that one, so backward computes no logits.
    """

    @staticmethod
    def forward(ctx, hidden, unembedding, targets, temperature, tile, triton):
        num_rows, width = hidden.shape
        wanted = ctx.needs_input_grad[0]
        largest = torch.full((num_rows,), -torch.inf, dtype=torch.float32, device=hidden.device)
        total, weighted, chosen = (torch.zeros_like(largest) for _ in range(3))
        uphill = torch.empty_like(hidden) if wanted else None
        for rows in slices(num_rows, tile.rows):
            running = [x[rows] for x in (largest, total, weighted, chosen)]
            mean = hidden.new_zeros(len(running[0]), width, dtype=torch.float32) if wanted else None
            for columns in slices(unembedding.shape[0], tile.columns):
                weight = unembedding[columns]
                logits = _logits(hidden[rows], weight)
                shrink, exponentials = _accumulate(
                    logits, targets[rows], columns.start, temperature, *running, dtype=hidden.dtype, triton=triton,
                    wanted=wanted,
                )  # fmt: skip
                del logits
                if mean is not None:
                    torch.addcmul(_logits(exponentials, weight.mT), mean, shrink[:, None], out=mean)
            if uphill is not None and mean is not None:
                uphill[rows] = (_rows_of(unembedding, targets[rows]).float() - mean / running[1][:, None]) / temperature
        normalizers = largest + total.log()
        entropy = normalizers - weighted / total
        ctx.save_for_backward(uphill)
        ctx.mark_non_differentiable(entropy)
        return chosen - normalizers, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, _grad_entropy):
        (uphill,) = ctx.saved_tensors
        return (uphill.float() * grad_logprobs[:, None]).to(uphill.dtype), None, None, None, None, None


def token_logprobs(
    hidden: Tensor,
    unembedding: Unembedding | Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    tile: Tile = TILE,
    path: Literal["auto", "triton", "plain"] = "auto",
) -> tuple[Tensor, Tensor]:
    """Natural log-probability float32 [N] of each target, and the entropy float32 [N], in nats, of its distribution.

    hidden [N, D]; unembedding [V, D], frozen: no gradient reaches it; targets int64 [N]; logits are divided by
    `temperature`. Gradients flow through the log-probabilities, not through the entropy. Memory: a tile of logits and
    of their exponentials, and [N, D] for the gradient. Raises ValueError on a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"log-probabilities need a temperature above 0, got {temperature}")
    triton = hidden.is_cuda if path == "auto" else path == "triton"
    logprobs, entropy = _TokenLogprobs.apply(hidden, unembedding, targets, temperature, tile, triton)
    return logprobs, entropy


def _rows_of(unembedding: Unembedding | Tensor, targets: Tensor) -> Tensor:
    """The targets' rows [n, D]."""
    if isinstance(unembedding, Tensor):
        return unembedding[targets]
    return unembedding.rows(targets)


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
    dtype: torch.dtype,
    triton: bool,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Adds a tile's columns, the vocabulary's from `first` on, to the four running figures of its rows, in place.

    Returns what sums of earlier tiles are to be multiplied by, float32 [n], and the exponentials [n, M] in `dtype` that
    this tile adds to `total`; these are not written unless wanted. `logits` is used up.
    """
    if triton:
        from stages.kernels.triton_logprobs import accumulate_kernel

        shrink = torch.empty_like(largest)
        exponentials = torch.empty(logits.shape if wanted else (1, 1), dtype=dtype, device=logits.device)
        accumulate_kernel[(logits.shape[0],)](
            logits, targets, largest, total, weighted, chosen, shrink, exponentials, logits.shape[1], first,
            1 / temperature, WANTED=wanted, BLOCK=2048, num_warps=8,
        )  # fmt: skip
        return shrink, exponentials
    logits.div_(temperature)
    highest = torch.maximum(largest, logits.amax(-1))
    exponentials = torch.exp(logits - highest[:, None])
    shrink = torch.exp(largest - highest)
    total.mul_(shrink).add_(exponentials.sum(-1))
    weighted.mul_(shrink).add_((exponentials * logits).sum(-1))
    largest.copy_(highest)
    at = targets - first
    here = (at >= 0) & (at < logits.shape[1])
    found = logits.gather(-1, at.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(-1)
    chosen.copy_(torch.where(here, found, chosen))
    return shrink, exponentials.to(dtype)
