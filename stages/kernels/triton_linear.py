"""A Triton kernel for a matrix times the rows of a decode step, where reading the matrix takes most of the time."""

import os

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def linear_kernel(
    x, weight, out, num_rows, num_outputs,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [N, M] = x [N, K] @ weight [M, K].T. Grid (M / BM, N / BN).

    The weights are the first operand, so that few rows fill a tensor core's tile. Every sum goes through K in order,
    whatever the tiles are: a row's bits do not depend on the other rows.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    real = n < num_rows
    rows = weight + tl.minimum(m, num_outputs - 1).to(tl.int64)[:, None] * K + k[None, :]
    columns = x + tl.where(real, n, 0)[None, :] * K + k[:, None]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        if K % BK == 0:
            w = tl.load(rows + start)
            v = tl.load(columns + start)
        else:
            w = tl.load(rows + start, mask=(start + k < K)[None, :], other=0.0)
            v = tl.load(columns + start, mask=(start + k < K)[:, None], other=0.0)
        if INTERPRETED:  # the interpreter multiplies bfloat16 as the integers that hold it
            w, v = w.to(tl.float32), v.to(tl.float32)
        acc = tl.dot(w, v, acc, input_precision="ieee")
    where = out + n.to(tl.int64)[None, :] * num_outputs + m[:, None]
    tl.store(where, acc.to(out.dtype.element_ty), mask=real[None, :] & (m < num_outputs)[:, None])
