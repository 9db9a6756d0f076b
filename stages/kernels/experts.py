"""Mixture of experts as gpt-oss has it: top-k routing, clamped SwiGLU, weights dense or MXFP4, factored LoRA beside
them.

Two paths that compute the same function: - `experts`: each expert works on just the tokens that chose it. For prefill
and training; gradients reach the input, the
  routing weights and the LoRA factors, never the frozen weights.
- `experts_fixed_shape`: every expert works on every row, and what was not chosen is weighted 0. For decode on the CPU,
where a
  row's bits depend on the number of rows in its matrix product: at a fixed number of rows they are the same whoever
  shares the batch. It costs E / k times the arithmetic of the first.

MXFP4 weights stay packed; one expert at a time is unpacked while it is used, in forward and again in backward.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Lora(NamedTuple):
    """Factored low-rank deltas of E matrices: W_e + scale * A_e^T B_e^T, never multiplied out."""

    a: Tensor  # [E, r, in]
    b: Tensor  # [E, out, r]
    scale: float


class ExpertWeight(Protocol):
    """E matrices [in, out] that can be had one at a time, whatever they are stored as."""

    bias: Tensor  # [E, out]
    num_experts: int
    packed: bool  # whether `matrix` unpacks, so that backward calls it again rather than keep its result

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        """Expert's matrix [in, out] in `dtype`."""
        ...

    def stack(self, dtype: torch.dtype) -> Tensor:
        """All matrices, [E, in, out] in `dtype`."""
        ...


def swiglu(gate_up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate) [..., F] of gate_up [..., 2F], even columns gates, odd columns ups,
    clamped.
    """
    gate = gate_up[..., 0::2].clamp(max=limit)
    up = gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


class _FrozenProduct(torch.autograd.Function):
    """rows @ weight.matrix(expert), which keeps no unpacked matrix for its backward."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: ExpertWeight, expert: int) -> Tensor:
        ctx.weight, ctx.expert = weight, expert
        return rows @ weight.matrix(expert, rows.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight.matrix(ctx.expert, grad.dtype).mT, None, None


def _project(rows: Tensor, weight: ExpertWeight, lora: Lora | None, expert: int) -> Tensor:
    """rows [n, in] through one expert's matrix, its bias and its LoRA: [n, out]."""
    if weight.packed:
        out = _FrozenProduct.apply(rows, weight, expert) + weight.bias[expert].to(rows.dtype)
    else:
        out = torch.addmm(weight.bias[expert].to(rows.dtype), rows, weight.matrix(expert, rows.dtype))
    if lora is not None:
        out = out + (rows @ lora.a[expert].mT.to(rows.dtype)) @ lora.b[expert].mT.to(rows.dtype) * lora.scale
    return out


def experts(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    gate_up: ExpertWeight,
    down: ExpertWeight,
    gate_up_lora: Lora | None = None,
    down_lora: Lora | None = None,
    alpha: float,
    limit: float,
) -> Tensor:
    """The weighted sum [N, D] of each token's chosen experts, added in the order of the experts.

    hidden [N, D]; indices int64 [N, k], distinct within a row; weights [N, k]; gate_up of D x 2F matrices (gate and up
    interleaved), down of F x D.
    """
    total = torch.zeros_like(hidden)
    for expert in range(gate_up.num_experts):
        tokens, place = torch.where(indices == expert)
        if tokens.numel() == 0:
            continue
        inner = swiglu(_project(hidden[tokens], gate_up, gate_up_lora, expert), alpha=alpha, limit=limit)
        out = _project(inner, down, down_lora, expert)
        total = total.index_add(0, tokens, out * weights[tokens, place, None].to(out.dtype))
    return total


def experts_fixed_shape(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    gate_up: ExpertWeight,
    down: ExpertWeight,
    gate_up_lora: Lora | None = None,
    down_lora: Lora | None = None,
    alpha: float,
    limit: float,
) -> Tensor:
    """As `experts`, with matrix products whose shapes depend on N alone, not on who was routed where; no gradients."""
    rows = hidden.expand(gate_up.num_experts, -1, -1)
    inner = swiglu(_project_all(rows, gate_up, gate_up_lora), alpha=alpha, limit=limit)
    out = _project_all(inner, down, down_lora)
    routing = torch.zeros(hidden.shape[0], gate_up.num_experts, dtype=out.dtype, device=out.device)
    routing.scatter_(1, indices, weights.to(out.dtype))
    return (out * routing.T.unsqueeze(-1)).sum(0)


def _project_all(rows: Tensor, weight: ExpertWeight, lora: Lora | None) -> Tensor:
    """rows [E, N, in] through every expert's matrix, bias and LoRA: [E, N, out]."""
    out = torch.baddbmm(weight.bias.to(rows.dtype).unsqueeze(1), rows, weight.stack(rows.dtype))
    if lora is not None:
        delta = torch.bmm(torch.bmm(rows, lora.a.mT.to(rows.dtype)), lora.b.mT.to(rows.dtype))
        out = out.add_(delta, alpha=lora.scale)
    return out
