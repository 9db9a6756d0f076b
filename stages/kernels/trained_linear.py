"""Frozen linear layers with LoRA for training, several of one input at once: queries, keys and values.

One product for all first factors, and one input gradient that every layer is added to in place: autograd on the modules
would hold one for each, and launch three times the kernels. Kept for backward are the input and A x.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.kernels.launch import applied


class Projection(NamedTuple):
    """W [M, K] (unpacked when asked for, where it is packed), bias [M], and LoRA A [R, K] and B [M, R] or neither."""

    outputs: int  # M
    weight: Callable[[], Tensor]
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float


def trained_linear(x: Tensor, projections: Sequence[Projection], *, only_backward: bool = False) -> tuple[Tensor, ...]:
    """Each one's W x + bias + scale * B A x [T, M] of x [T, K]; differentiable in x, A and B. All have LoRA or none.

    only_backward: the results are not computed and have no memory; for a checkpointed layer's last projection, whose
    backward needs the graph alone.
    """
    factors = [factor for each in projections if each.a is not None for factor in (each.a, each.b)]
    if factors and len(factors) != 2 * len(projections):
        raise ValueError("either all projections of an input have LoRA or none has")
    out: tuple[Tensor, ...] = applied(_TrainedLinear, x, tuple(projections), only_backward, *factors)
    return out


class _TrainedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, projections, only_backward, *factors):
        if only_backward:
            outs = [x.new_empty(()).expand(len(x), each.outputs) for each in projections]
        else:
            outs = [F.linear(x, each.weight(), each.bias) for each in projections]
        inner = None
        if factors:
            inner = F.linear(x, _first_factors(factors, x.dtype))
        if inner is not None and not only_backward:
            parts = inner.split(_ranks(factors), dim=1)
            for out, b, part, each in zip(outs, factors[1::2], parts, projections, strict=True):
                out.addmm_(part, b.mT.to(x.dtype), alpha=each.scale)
        ctx.save_for_backward(x, inner, *factors)
        ctx.projections = projections
        return tuple(outs)

    @staticmethod
    def backward(ctx, *grads):
        x, inner, *factors = ctx.saved_tensors
        of_x = None
        for grad, each in zip(grads, ctx.projections, strict=True):
            weight = each.weight()
            of_x = grad @ weight if of_x is None else of_x.addmm_(grad, weight)
        if not factors:
            return of_x, None, None
        scaled = zip(grads, factors[1::2], ctx.projections, strict=True)
        of_inner = _joined([_scaled(each.scale, grad, b.to(grad.dtype)) for grad, b, each in scaled], dim=1)
        ranks = _ranks(factors)
        of_factors = []
        parts = zip(
            grads, ctx.projections, inner.split(ranks, dim=1), (of_inner.mT @ x).split(ranks), factors[::2],
            factors[1::2], strict=True,
        )  # fmt: skip
        for grad, each, part, of_a, a, b in parts:
            of_factors += [of_a.to(a.dtype), _scaled(each.scale, grad.mT, part).to(b.dtype)]
        return of_x.addmm_(of_inner, _first_factors(factors, x.dtype)), None, None, *of_factors


def _scaled(scale: float, left: Tensor, right: Tensor) -> Tensor:
    """scale * left @ right, in one launch and rounded once."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _ranks(factors: Sequence[Tensor]) -> list[int]:
    """The columns that each projection has of A x."""
    return [len(a) for a in factors[::2]]


def _first_factors(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Every A, one below the other."""
    return _joined([a.to(dtype) for a in factors[::2]], dim=0)


def _joined(parts: list[Tensor], *, dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
