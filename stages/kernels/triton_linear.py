"""A Triton kernel for a matrix times the rows of a decode step, where reading the matrix takes most of the time."""

import triton
import triton.language as tl

from stages.kernels.triton_dot import dot


@triton.jit
def linear_kernel(
    x, weight, out, num_rows, num_outputs,
    K: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [PARTS, N, M]: x [N, K] @ weight [M, K].T over each of PARTS equal parts of K. Grid (M / BM, N / BN, PARTS).

    The weights are the first operand, so that few rows fill a tensor core's tile. Every sum goes through its part of K
    in order, whatever the tiles are: a row's bits do not depend on the other rows. EARLY: the first weights are asked
    for before x is there.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    part = tl.program_id(2)
    PART: tl.constexpr = K // PARTS
    k = part * PART + tl.arange(0, BK)
    real = n < num_rows
    rows = weight + tl.minimum(m, num_outputs - 1).to(tl.int64)[:, None] * K + k[None, :]
    columns = x + tl.where(real, n, 0)[None, :] * K + k[:, None]
    if EARLY:
        early = tl.load(rows)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([BM, BN], tl.float32)
    if EARLY:
        acc = dot(early, tl.load(columns), acc)
    for start in tl.range(BK if EARLY else 0, PART, BK, num_stages=STAGES):
        if PART % BK == 0:
            acc = dot(tl.load(rows + start), tl.load(columns + start), acc)
        else:
            w = tl.load(rows + start, mask=(start + tl.arange(0, BK) < PART)[None, :], other=0.0)
            acc = dot(w, tl.load(columns + start, mask=(start + tl.arange(0, BK) < PART)[:, None], other=0.0), acc)
    out += part.to(tl.int64) * num_rows * num_outputs
    where = out + n.to(tl.int64)[None, :] * num_outputs + m[:, None]
    tl.store(where, acc.to(out.dtype.element_ty), mask=real[None, :] & (m < num_outputs)[:, None])
