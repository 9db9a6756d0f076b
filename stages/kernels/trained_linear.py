"""Frozen linear layers with LoRA for training, several of one input at once: queries, keys and values.

One product for all first factors, and one input gradient that every layer is added to in place: autograd on the modules
would hold one for each, and launch three times the kernels. Kept for backward are the input and A x.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Projection(NamedTuple):
    """W [M, K] (unpacked when asked for, where it is packed), bias [M], and LoRA A [R, K] and B [M, R] or neither."""

    weight: Callable[[], Tensor]
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float


def trained_linear(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Each one's W x + bias + scale * B A x [T, M] of x [T, K]; differentiable in x, A and B. All have LoRA or none."""
    factors = [factor for each in projections if each.a is not None for factor in (each.a, each.b)]
    if factors and len(factors) != 2 * len(projections):
        raise ValueError("either all projections of an input have LoRA or none has")
    out: tuple[Tensor, ...] = _TrainedLinear.apply(x, tuple(projections), *factors)
    return out


class _TrainedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, projections, *factors):
        outs = [F.linear(x, each.weight(), each.bias) for each in projections]
        inner = None
        if factors:
            inner = F.linear(x, torch.cat([a.to(x.dtype) for a in factors[::2]]))
            for out, b, part, each in zip(outs, factors[1::2], _parts(inner, factors), projections, strict=True):
                out.addmm_(part, b.mT.to(x.dtype), alpha=each.scale)
        ctx.save_for_backward(x, inner, *factors)
        ctx.projections = projections
        return tuple(outs)

    @staticmethod
    def backward(ctx, *grads):
        x, inner, *factors = ctx.saved_tensors
        of_x, of_inner = None, []
        of_factors = []
        for place, (grad, each) in enumerate(zip(grads, ctx.projections, strict=True)):
            weight = each.weight()
            of_x = grad @ weight if of_x is None else of_x.addmm_(grad, weight)
            if factors:
                of_inner.append(grad @ (factors[2 * place + 1] * each.scale).to(grad.dtype))
        if factors:
            together = of_inner[0] if len(of_inner) == 1 else torch.cat(of_inner, dim=1)
            of_a = together.mT @ x
            for place, (grad, each) in enumerate(zip(grads, ctx.projections, strict=True)):
                a, b = factors[2 * place : 2 * place + 2]
                of_b = (grad.mT @ _parts(inner, factors)[place]) * each.scale
                of_factors += [_parts(of_a.mT, factors)[place].mT.to(a.dtype), of_b.to(b.dtype)]
            of_x = of_x.addmm_(together, torch.cat([a.to(x.dtype) for a in factors[::2]]))
        return of_x, None, *of_factors


def _parts(inner: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The columns of each projection's A x."""
    return inner.split([len(a) for a in factors[::2]], dim=1)
