"""Triton kernels of grouped products: rows sorted by group, each group with a matrix of its own."""

import triton
import triton.language as tl

from stages.kernels.triton_dot import dot


@triton.jit
def grouped_kernel(
    rows, matrices, ends, out, num_outputs, rows_a_group, out_stride,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BACK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [n, N] = each row of rows [n, K] times its group's matrix: [N, K], or [K, N] if BACK.

    rows and matrices are tensor descriptors, whose loads are 0 past a dimension's end; the matrices lie one below the
    other, rows_a_group each: what is read past one's end meets zeros, or is not stored. ends int32 [G]: where each
    group's rows end. A group's tiles follow each other, those of one slice of its matrix first. Grid
    ((n / BM + G) * (N / BN),), more than there are tiles; GP: G up to a power of two.
    """
    group = tl.arange(0, GP)
    end = tl.load(ends + group, mask=group < G, other=0)
    start = tl.load(ends + group - 1, mask=(group > 0) & (group < G), other=0)
    across = tl.cdiv(num_outputs, BN)
    tiles = tl.cdiv(end - start, BM) * across
    before = tl.cumsum(tiles, axis=0) - tiles
    tile = tl.program_id(0)
    mine = (tile >= before) & (tile < before + tiles)
    if tl.sum(mine.to(tl.int32), axis=0) == 0:
        return
    tile -= tl.sum(tl.where(mine, before, 0), axis=0)
    end = tl.sum(tl.where(mine, end, 0), axis=0)
    start = tl.sum(tl.where(mine, start, 0), axis=0)
    matrix = tl.sum(tl.where(mine, group, 0), axis=0) * rows_a_group
    down = tl.cdiv(end - start, BM)
    first = start + tile % down * BM
    column = tile // down * BN
    acc = tl.zeros([BM, BN], tl.float32)
    for begin in tl.range(0, K, BK, num_stages=STAGES):
        left = rows.load([first, begin])
        if BACK:
            acc = dot(left, matrices.load([matrix + begin, column]), acc)
        else:
            acc = dot(left, matrices.load([matrix + column, begin]).T, acc)
    row = first + tl.arange(0, BM)
    output = column + tl.arange(0, BN)
    where = out + row.to(tl.int64)[:, None] * out_stride + output[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=(row < end)[:, None] & (output < num_outputs)[None, :])


@triton.jit
def outer_kernel(
    left, right, ends, out, left_stride, right_stride, num_left, num_right,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [G, M, N] = the sum of left [n, M] times right [n, N] over each group's rows; 0 for a group without any.

    Grid (M / BM, N / BN, G).
    """
    group = tl.program_id(2)
    end = tl.load(ends + group)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for begin in tl.range(start, end, BK, num_stages=STAGES):
        row = begin + tl.arange(0, BK)
        here = row.to(tl.int64)
        real = row < end
        a = left + here[None, :] * left_stride + m[:, None]
        b = right + here[:, None] * right_stride + n[None, :]
        a = tl.load(a, mask=real[None, :] & (m < num_left)[:, None], other=0.0)
        acc = dot(a, tl.load(b, mask=real[:, None] & (n < num_right)[None, :], other=0.0), acc)
    out += group.to(tl.int64) * num_left * num_right
    where = out + m[:, None] * num_right + n[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=(m < num_left)[:, None] & (n < num_right)[None, :])
