"""A Triton kernel for a matrix times very few vectors, where reading the matrix is all that takes time."""

import triton
import triton.language as tl


@triton.jit
def few_rows_kernel(
    x, weight, out, num_outputs,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [N, M] = x [N, K] @ weight [M, K].T, BM outputs a program. The weights are asked for before x is there."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, KP)
    inside = (m < num_outputs)[:, None] & (k < K)[None, :]
    rows = tl.load(weight + m.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for n in tl.static_range(N):
        values = tl.load(x + n * K + k, mask=k < K, other=0.0).to(tl.float32)
        total = tl.sum(rows.to(tl.float32) * values[None, :], axis=1)
        tl.store(out + n * num_outputs + m, total.to(out.dtype.element_ty), mask=m < num_outputs)
