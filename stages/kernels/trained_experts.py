"""Mixture of experts for training, straight from MXFP4: forward, and the gradients of the input, of the routing weights
and of factored LoRA. The frozen weights have none.

Tokens and experts are taken some at a time (Tiling); only those experts' matrices are unpacked, and unpacked again in
backward. With all experts at once nothing waits for the card. Of a layer nothing is kept but its input, and gate_up's
output where there is room: backward computes that again otherwise, and of down only what leads back, since a routing
weight's gradient is that of SwiGLU's output times that output. LoRA rides in the frozen product: B stands in further
columns of the unpacked matrix, A x in further columns of its rows, so that both sums are one, in float32.

Shapes as in the package's docstring, n rows of assigned tokens, R LoRA rank filled up to a multiple of 8.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.kernels.experts import Lora
from stages.kernels.grouped import grouped, grouped_back, grouped_outer
from stages.kernels.launch import aligned_rows, applied, slices
from stages.kernels.packed_experts import Relaid, dequantize, stored_rows
from stages.kernels.routing import Sorted, sort_by_expert

RANK_TILE = 8  # columns of 16 bytes, which grouped products need


class Tiling(NamedTuple):
    """What is worked on at once: 131 072 tokens' inner activations would be 26 GB, and of gpt-oss-20b's matrices eight
    experts are 0.4 GB in 16 bits.
    """

    rows: int = 16_384
    experts: int = 32


ALL_AT_ONCE = Tiling()


class FrozenExperts(NamedTuple):
    """One layer's weights. The biases float32 [E, M]; gate_up's is in the order of the stored rows."""

    gate_up: Relaid
    down: Relaid
    gate_up_bias: Tensor
    down_bias: Tensor
    alpha: float
    limit: float


def frozen_experts(
    gate_up: Relaid, down: Relaid, *, gate_up_bias: Tensor, down_bias: Tensor, alpha: float, limit: float
) -> FrozenExperts:
    """The weights, with biases [E, M] in the checkpoint's order."""
    rows = stored_rows(gate_up.shape[1], interleaved=gate_up.interleaved, device=gate_up_bias.device)
    return FrozenExperts(
        gate_up, down, gate_up_bias[:, rows].float().contiguous(), down_bias.float().contiguous(), alpha, limit
    )


def trained_experts(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    frozen: FrozenExperts,
    *,
    gate_up_lora: Lora | None,
    down_lora: Lora | None,
    tiling: Tiling = ALL_AT_ONCE,
    only_backward: bool = False,
    keep: bool = False,
) -> Tensor:
    """The weighted sum float32 [N, D] of each token's chosen experts.

    hidden [N, D] in the compute dtype; indices int64 [N, k]; weights float32 [N, k]; either both LoRAs or none.
    only_backward: the result is not computed and has no memory; for a checkpointed layer, whose backward needs the
    graph alone. keep: gate_up's output, k * 2F numbers a token, stays until backward.
    """
    factors: tuple[Tensor | None, ...] = (None, None, None, None)
    scales = (0.0, 0.0)
    if gate_up_lora is not None and down_lora is not None:
        factors = (gate_up_lora.a, gate_up_lora.b, down_lora.a, down_lora.b)
        scales = (gate_up_lora.scale, down_lora.scale)
    hidden, indices, weights = hidden.contiguous(), indices.contiguous(), weights.contiguous()
    options = (frozen, scales, tiling, only_backward, keep)
    out: Tensor = applied(_TrainedExperts, hidden, indices, weights, *options, *factors)
    return out


class _TrainedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, indices, weights, frozen, scales, tiling, only_backward, keep, *factors):
        ctx.save_for_backward(hidden, indices, weights, *factors)
        ctx.frozen, ctx.scales, ctx.tiling = frozen, scales, tiling
        ctx.kept = []
        out = torch.empty((), dtype=torch.float32, device=hidden.device).expand(hidden.shape)
        if not only_backward:
            out = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
            layer = _Layer(frozen, scales, factors, hidden.dtype, tiling.experts)
            for rows in slices(hidden.shape[0], tiling.rows):
                layer.forward(hidden[rows], indices[rows], weights[rows], out[rows], ctx.kept if keep else None)
        return out

    @staticmethod
    def backward(ctx, grad):
        hidden, indices, weights, *factors = ctx.saved_tensors
        layer = _Layer(ctx.frozen, ctx.scales, tuple(factors), hidden.dtype, ctx.tiling.experts)
        grad_hidden, grad_weights = torch.empty_like(hidden), torch.empty_like(weights)
        for rows in slices(hidden.shape[0], ctx.tiling.rows):
            given = hidden[rows], indices[rows], weights[rows], grad[rows]
            kept = ctx.kept.pop(0) if ctx.kept else None
            layer.backward(*given, grad_hidden[rows], grad_weights[rows], kept)
        return grad_hidden, None, grad_weights, None, None, None, None, None, *layer.factor_grads()


class _Chunk:
    """The assignments of a tile's tokens to some experts."""

    def __init__(self, experts: slice, where: slice, ends: Tensor) -> None:
        self.experts = experts
        self.where = where  # of the sorted assignments
        self.ends = ends  # int32, where each one's rows end

    @functools.cached_property
    def empty(self) -> Tensor:
        """Whether an expert has no assignments, bool [G, 1, 1]."""
        return (self.ends.diff(prepend=self.ends.new_zeros(1)) == 0)[:, None, None]


def _chunks(order: Sorted, at_once: int) -> Iterator[_Chunk]:
    """So many experts at a time, those without tokens left out. Waits for the card unless they are all."""
    num_experts = len(order.ends)
    if at_once >= num_experts:
        yield _Chunk(slice(0, num_experts), slice(0, len(order.owner)), order.ends)
        return
    ends, start = order.ends.tolist(), 0
    for experts in slices(num_experts, at_once):
        stop = ends[experts.stop - 1]
        if start < stop:
            yield _Chunk(experts, slice(start, stop), order.ends[experts] - start)
        start = stop


class _Kept(NamedTuple):
    """Of a tile of tokens, from forward to backward."""

    order: Sorted
    inners: list[Tensor]  # gate_up's output of each chunk


class _Projection:
    """A stack of frozen matrices [E, M, K] and its LoRA, as the products of some experts take them."""

    def __init__(self, weight: Relaid, a: Tensor | None, b: Tensor | None, scale: float, dtype: torch.dtype) -> None:
        self.weight, self.dtype, self.scale = weight, dtype, scale
        _, self.outputs, self.inputs = weight.shape
        self.a, self.b = a, b
        self.rank = 0 if a is None else a.shape[1]
        self.room = -(-self.rank // RANK_TILE) * RANK_TILE
        self.rows = None
        if b is not None and weight.interleaved:
            self.rows = _stored_rows(self.outputs, b.device)
        self.grad_a: Tensor | None = None  # as soon as there is something to add
        self.grad_b: Tensor | None = None

    def matrices(self, experts: slice) -> Tensor:
        """[G, M, K + R] as stored: W and scale * B."""
        out = dequantize(self.weight, self.dtype, experts=experts, stored_order=True, room=self.room)
        if self.b is not None:
            factor = self.b[experts] if self.rows is None else self.b[experts][:, self.rows]
            torch.mul(factor, self.scale, out=out[:, :, self.inputs : self.inputs + self.rank])
            if self.room > self.rank:
                out[:, :, self.inputs + self.rank :] = 0
        return out

    def first_factors(self, experts: slice) -> Tensor:
        """A [G, R, K], zeros in the rows past the rank."""
        assert self.a is not None
        some = self.a[experts].to(self.dtype)
        return some if self.room == self.rank else F.pad(some, (0, 0, 0, self.room - self.rank))

    def extend(self, rows: Tensor, chunk: _Chunk) -> None:
        """Writes A x beside rows x, [n, K + R]."""
        if self.room:
            rows[:, self.inputs :] = _grouped(rows[:, : self.inputs], self.first_factors(chunk.experts), chunk)

    def add_grads(self, rows: Tensor, grad_out: Tensor, grad_inner: Tensor, chunk: _Chunk) -> None:
        """Adds to the factors' gradients: of rows [n, K + R], grad_out [n, M] as stored and grad_inner [n, R]."""
        of_a = _outer(grad_inner, rows[:, : self.inputs], chunk)[:, : self.rank]
        of_b = _outer(grad_out, rows[:, self.inputs :], chunk)[..., : self.rank]
        self.grad_a = self._added(self.grad_a, of_a, chunk)
        of_b = of_b * self.scale
        if self.rows is not None:
            of_b = torch.empty_like(of_b).index_copy_(1, self.rows, of_b)
        self.grad_b = self._added(self.grad_b, of_b, chunk)

    def _added(self, total: Tensor | None, part: Tensor, chunk: _Chunk) -> Tensor:
        """The sum with the part [G, ...] of the chunk's experts: float32 [E, ...] as soon as there are two."""
        num_experts = self.weight.shape[0]
        if total is None and len(part) == num_experts:
            return part
        total = part.new_zeros(num_experts, *part.shape[1:], dtype=torch.float32) if total is None else total.float()
        total[chunk.experts] += part
        return total


class _Layer:
    """The layer's computation on tiles of tokens; gathers the factors' gradients."""

    def __init__(
        self,
        frozen: FrozenExperts,
        scales: tuple[float, float],
        factors: tuple[Any, ...],
        dtype: torch.dtype,
        at_once: int,
    ) -> None:
        self.frozen, self.dtype, self.at_once = frozen, dtype, at_once
        a1, b1, a2, b2 = factors
        self.gate_up = _Projection(frozen.gate_up, a1, b1, scales[0], dtype)
        self.down = _Projection(frozen.down, a2, b2, scales[1], dtype)
        self.factors = factors

    def factor_grads(self) -> tuple[Tensor | None, ...]:
        if self.factors[0] is None:
            return (None,) * 4
        grads = (self.gate_up.grad_a, self.gate_up.grad_b, self.down.grad_a, self.down.grad_b)
        return tuple(
            None if grad is None else grad.to(factor.dtype) for grad, factor in zip(grads, self.factors, strict=True)
        )

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor, out: Tensor, kept: list[_Kept] | None) -> None:
        """Writes out float32 [N, D]; adds what backward has no need to compute again to `kept`."""
        from stages.kernels.triton_experts import combine_kernel

        top_k, width = indices.shape[1], out.shape[1]
        order = sort_by_expert(indices, self.gate_up.weight.shape[0])
        if kept is not None:
            kept.append(_Kept(order, []))
        outputs: Tensor | None = None
        for chunk in _chunks(order, self.at_once):
            rows = self._rows(hidden, order, chunk, top_k)
            inner = _grouped(rows, self.gate_up.matrices(chunk.experts), chunk)
            del rows
            activations = self._swiglu(inner, order, chunk)
            if kept is not None:
                kept[-1].inners.append(inner)
            del inner
            part = _grouped(activations, self.down.matrices(chunk.experts), chunk)
            del activations
            outputs = _joined(outputs, part, chunk, order)
            del part
        combine_kernel[(out.shape[0], -(-width // 1024))](
            outputs, order.places, indices, weights, self.frozen.down_bias, out,
            D=width, TOPK=top_k, BLOCK=1024, num_warps=4,
        )  # fmt: skip

    def backward(
        self,
        hidden: Tensor,
        indices: Tensor,
        weights: Tensor,
        grad: Tensor,
        grad_hidden: Tensor,
        grad_weights: Tensor,
        kept: _Kept | None,
    ) -> None:
        """Writes grad_hidden [N, D] and grad_weights [N, k]; adds to the factors' gradients. What was kept is used
        up.
        """
        from stages.kernels.triton_experts import sum_kernel

        num_rows, top_k = indices.shape
        order = kept.order if kept else sort_by_expert(indices, self.gate_up.weight.shape[0])
        grad = grad.to(self.dtype).contiguous()
        routing = weights.reshape(-1)[order.assigned]
        of_routing = torch.empty_like(routing)
        of_rows: Tensor | None = None
        more: Tensor | None = None
        for chunk in _chunks(order, self.at_once):
            of_out = _gathered(grad, order.assigned[chunk.where], top_k)
            of_activations = _grouped_back(of_out, self.down.matrices(chunk.experts), chunk)
            of_second = of_activations[:, self.down.inputs :]  # of A x, [n, R]
            through = self._through_first_factors(self.down, of_second, chunk)
            rows = self._rows(hidden, order, chunk, top_k)
            matrices = self.gate_up.matrices(chunk.experts)
            inner = kept.inners.pop(0) if kept else _grouped(rows, matrices, chunk)
            share = routing[chunk.where]
            activations = self._swiglu_backward(
                inner, of_activations, through, of_out, share, of_routing[chunk.where], order, chunk
            )
            del through
            if self.down.room:
                self.down.extend(activations, chunk)
                activations[:, self.down.inputs :] *= share[:, None]
                self.down.add_grads(activations, of_out, of_second * share[:, None].to(of_second.dtype), chunk)
            del activations, of_activations, of_second, of_out
            part = _grouped_back(inner, matrices, chunk)
            del matrices
            of_first = part[:, self.gate_up.inputs :]
            if self.gate_up.room:
                self.gate_up.add_grads(rows, inner, of_first, chunk)
            del rows, inner
            through = self._through_first_factors(self.gate_up, of_first, chunk)
            of_rows = _joined(of_rows, part, chunk, order)
            if through is not None:
                more = _joined(more, through, chunk, order)
            del part, of_first, through
        assert of_rows is not None, "there is no token without an expert"
        sum_kernel[(num_rows, -(-hidden.shape[1] // 1024))](
            of_rows, of_rows.stride(0), of_rows if more is None else more, order.places, grad_hidden,
            D=hidden.shape[1], TOPK=top_k, MORE=more is not None, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        grad_weights.copy_(of_routing[order.places].view(num_rows, top_k))

    def _rows(self, hidden: Tensor, order: Sorted, chunk: _Chunk, top_k: int) -> Tensor:
        """The chunk's tokens [n, D + R], A x beside them."""
        rows = _gathered(hidden, order.assigned[chunk.where], top_k, room=self.gate_up.room)
        self.gate_up.extend(rows, chunk)
        return rows

    def _swiglu(self, inner: Tensor, order: Sorted, chunk: _Chunk) -> Tensor:
        """[n, F + R] of inner [n, 2F]."""
        from stages.kernels.triton_experts import swiglu_kernel

        out = self._activations(inner)
        swiglu_kernel[(inner.shape[0], -(-self.down.inputs // 1024))](
            inner, self.frozen.gate_up_bias, order.owner[chunk.where], out, out.stride(0), self.frozen.alpha,
            self.frozen.limit, M=inner.shape[1], BLOCK=1024, num_warps=4,
        )  # fmt: skip
        self.down.extend(out, chunk)
        return out

    def _swiglu_backward(
        self,
        inner: Tensor,
        grad: Tensor,
        more: Tensor | None,
        grad_out: Tensor,
        routing: Tensor,
        of_routing: Tensor,
        order: Sorted,
        chunk: _Chunk,
    ) -> Tensor:
        """SwiGLU's output [n, F + R], of whose last columns nothing is written; `inner` becomes its own gradient."""
        from stages.kernels.triton_experts import swiglu_backward_kernel

        out = self._activations(inner)
        swiglu_backward_kernel[(inner.shape[0],)](
            inner, self.frozen.gate_up_bias, order.owner[chunk.where], grad, grad.stride(0),
            grad if more is None else more, routing, out, out.stride(0), grad_out, self.frozen.down_bias, of_routing,
            self.frozen.alpha, self.frozen.limit,
            M=inner.shape[1], D=grad_out.shape[1], MORE=more is not None, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        return out

    def _activations(self, inner: Tensor) -> Tensor:
        return aligned_rows(inner.shape[0], self.down.inputs + self.down.room, like=inner)

    def _through_first_factors(self, projection: _Projection, of_inner: Tensor, chunk: _Chunk) -> Tensor | None:
        """What reaches rows [n, K] through A, of the gradient [n, R] of A x."""
        if not projection.room:
            return None
        return _grouped_back(of_inner, projection.first_factors(chunk.experts), chunk)


@functools.cache
def _stored_rows(num_rows: int, device: torch.device) -> Tensor:
    return stored_rows(num_rows, interleaved=True, device=device)


def _joined(whole: Tensor | None, part: Tensor, chunk: _Chunk, order: Sorted) -> Tensor:
    """All assignments' rows, the chunk's part among them; the part itself where it is all."""
    count = len(order.owner)
    if len(part) == count:
        return part
    if whole is None:
        whole = part.new_empty(count, part.shape[1])
    whole[chunk.where] = part
    return whole


def _gathered(x: Tensor, assigned: Tensor, top_k: int, *, room: int = 0) -> Tensor:
    """The tokens' rows [n, K + room] of x [N, K] for these assignments; the last columns are not written."""
    from stages.kernels.triton_experts import gather_kernel

    width = x.shape[1]
    out = aligned_rows(len(assigned), width + room, like=x)
    gather_kernel[(len(assigned),)](x, assigned, out, out.stride(0), TOPK=top_k, K=width, BLOCK=1024, num_warps=4)
    return out


def _grouped(rows: Tensor, matrices: Tensor, chunk: _Chunk) -> Tensor:
    """rows [n, K] times the transposes of each one's matrix of [G, M, K]: [n, M]."""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, matrices.mT, offs=chunk.ends)
    return grouped(rows, matrices, chunk.ends)


def _grouped_back(rows: Tensor, matrices: Tensor, chunk: _Chunk) -> Tensor:
    """rows [n, M] times each one's matrix of [G, M, K]: [n, K]."""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, matrices, offs=chunk.ends)
    return grouped_back(rows, matrices, chunk.ends)


def _outer(left: Tensor, right: Tensor, chunk: _Chunk) -> Tensor:
    """For each expert its rows' sum of outer products: [G, M, K] of left [n, M] and right [n, K]."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        found = F.grouped_mm(left.mT, right, offs=chunk.ends)
        # What a product of no rows leaves is not said anywhere.
        return found.masked_fill_(chunk.empty, 0)
    return grouped_outer(left, right, chunk.ends)
