"""Triton kernels of RMS norms: of the engine, which close a block of the decoder (its output into the residual stream,
and the next norm), and of training, forward and backward.
"""

import triton
import triton.language as tl


@triton.jit
def _write_norm(values, weight, out, d, inside, eps, D: tl.constexpr):
    """out [D], the RMS norm of float32 values, as transformers rounds it."""
    scaled = values * tl.rsqrt(tl.sum(values * values, axis=0) / D + eps)
    scaled *= tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + d, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _normed(residual, weight, out, row, total, d, inside, eps, D: tl.constexpr):
    """Writes the stream and its RMS norm."""
    tl.store(residual + row * D + d, total, mask=inside)
    _write_norm(total, weight, out + row * D, d, inside, eps, D)


@triton.jit
def embed_norm_kernel(
    embedding, tokens, rows, residual, weight, out, eps, D: tl.constexpr, DP: tl.constexpr, PDL: tl.constexpr
):
    """residual float32 [b, D] = embedding[tokens[rows]], and its norm. Grid (b,); DP: D up to a power of two."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    inside = d < D
    token = tl.load(tokens + tl.load(rows + row))
    total = tl.load(embedding + token * D + d, mask=inside, other=0.0).to(tl.float32)
    _normed(residual, weight, out, row, total, d, inside, eps, D)


@triton.jit
def add_norm_kernel(
    residual, delta, bias, b, weight, out, part_stride, eps, scale,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """residual [N, D] += delta + bias + scale * B t, and its norm. Grid (N,).

    delta [PARTS, N, D + R], to be summed: a projection's outputs and, in the last R columns, LoRA's inner products t; b
    [D, R].
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    inside = d < D
    width: tl.constexpr = D + R
    delta += row * width
    total = tl.load(delta + d, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(delta + part * part_stride + d, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    if R > 0:
        rank = tl.arange(0, RP)
        t = tl.load(delta + D + rank, mask=rank < R, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            t += tl.load(delta + part * part_stride + D + rank, mask=rank < R, other=0.0).to(tl.float32)
        factor = tl.load(b + d[:, None] * R + rank[None, :], mask=inside[:, None] & (rank < R)[None, :], other=0.0)
        total += tl.sum(factor.to(tl.float32) * t[None, :], axis=1) * scale
    total += tl.load(residual + row * D + d, mask=inside, other=0.0)
    _normed(residual, weight, out, row, total, d, inside, eps, D)


@triton.jit
def combine_norm_kernel(
    residual, partials, routing, weight, out, part_stride, eps,
    D: tl.constexpr, DP: tl.constexpr, TOPK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """residual [N, D] += the chosen experts' outputs by their weights, and its norm; always in the same order.

    partials float32 [PARTS, N * TOPK, D]; routing float32 [N, TOPK]. Grid (N,).
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    inside = d < D
    total = tl.load(residual + row * D + d, mask=inside, other=0.0)
    for choice in tl.static_range(TOPK):
        where = partials + (row * TOPK + choice) * D + d
        value = tl.load(where, mask=inside, other=0.0)
        for part in tl.static_range(1, PARTS):
            value += tl.load(where + part * part_stride, mask=inside, other=0.0)
        total += value * tl.load(routing + row * TOPK + choice)
    _normed(residual, weight, out, row, total, d, inside, eps, D)


@triton.jit
def norm_kernel(x, weight, out, eps, D: tl.constexpr, DP: tl.constexpr):
    """out [N, D], the RMS norm of x [N, D]. Grid (N,); DP: D up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    inside = d < D
    values = tl.load(x + row * D + d, mask=inside, other=0.0).to(tl.float32)
    _write_norm(values, weight, out + row * D, d, inside, eps, D)


@triton.jit
def advance_kernel(stream, delta, weight, rounded, normed, eps, D: tl.constexpr, DP: tl.constexpr, ADD: tl.constexpr):
    """stream float32 [N, D] += delta [N, D] if ADD; writes it rounded, and its RMS norm, both [N, D]. Grid (N,)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    inside = d < D
    at = row * D + d
    values = tl.load(stream + at, mask=inside, other=0.0)
    if ADD:
        values += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(stream + at, values, mask=inside)
    tl.store(rounded + at, values.to(rounded.dtype.element_ty), mask=inside)
    _write_norm(values, weight, normed + row * D, d, inside, eps, D)


@triton.jit
def norm_backward_kernel(x, weight, grad, out, eps, D: tl.constexpr, DP: tl.constexpr):
    """out float32 [N, D] += what the norm's gradient [N, D] is to x [N, D]. Grid (N,)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    inside = d < D
    values = tl.load(x + row * D + d, mask=inside, other=0.0).to(tl.float32)
    scaled = tl.load(grad + row * D + d, mask=inside, other=0.0).to(tl.float32)
    scaled *= tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / D + eps)
    along = tl.sum(values * scaled, axis=0) / D * inverse * inverse
    total = tl.load(out + row * D + d, mask=inside, other=0.0)
    tl.store(out + row * D + d, total + (scaled - values * along) * inverse, mask=inside)
