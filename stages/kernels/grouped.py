"""Products of rows that are sorted by group, each group's with a matrix of its own: what experts are, and their LoRA.

For what PyTorch's grouped_mm has nothing fast for: in float16 on a card it waits to learn the groups' sizes, and takes
them one by one. Here that is one launch; in float32, and on the CPU, the groups are taken one by one.

Shapes: n rows, G groups; ends int32 [G], where each group's rows end, the last one's at n. In 16 bits on a card rows
begin at multiples of 16 bytes, and the matrices lie one below the other.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.kernels.launch import Path, on_hopper, power_of_two


class Tile(NamedTuple):
    """How a program's part of a product is cut, at most. None of it changes a bit but `inputs`."""

    rows: int
    outputs: int
    inputs: int  # of a turn of its loop
    warps: int
    stages: int


# The best of those tried on one H200 with gpt-oss-20b's shapes.
LARGE = Tile(128, 256, 64, 8, 4)
SMALL = Tile(64, 128, 32, 4, 3)  # for cards with less shared memory
OUTER = Tile(128, 128, 64, 4, 3)  # of a sum of outer products, whose inputs are the group's rows


def grouped(rows: Tensor, matrices: Tensor, ends: Tensor, *, path: Path = "auto") -> Tensor:
    """rows [n, K] times the transposes of each one's matrix of [G, M, K]: [n, M]."""
    if _in_triton(rows, path):
        return _product(rows, matrices, ends, back=False)
    parts = zip(rows.split(_counts(ends)), matrices, strict=True)
    return torch.cat([F.linear(some, matrix) for some, matrix in parts])


def grouped_back(rows: Tensor, matrices: Tensor, ends: Tensor, *, path: Path = "auto") -> Tensor:
    """rows [n, M] times each one's matrix of [G, M, K]: [n, K]."""
    if _in_triton(rows, path):
        return _product(rows, matrices, ends, back=True)
    return torch.cat([some @ matrix for some, matrix in zip(rows.split(_counts(ends)), matrices, strict=True)])


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor, *, path: Path = "auto") -> Tensor:
    """For each group its rows' sum of outer products: [G, M, K] of left [n, M] and right [n, K]."""
    if _in_triton(left, path):
        return _outer(left, right, ends)
    counts = _counts(ends)
    parts = zip(left.split(counts), right.split(counts), strict=True)
    return torch.stack([some.mT @ other for some, other in parts])


def _in_triton(rows: Tensor, path: Path) -> bool:
    return path == "triton" or (rows.is_cuda and rows.dtype != torch.float32)


def _counts(ends: Tensor) -> list[int]:
    """Each group's rows. Waits for a card."""
    found: list[int] = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return found


def _product(rows: Tensor, matrices: Tensor, ends: Tensor, *, back: bool, tile: Tile | None = None) -> Tensor:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from stages.kernels.triton_grouped import grouped_kernel

    num_rows, inputs = rows.shape
    num_groups, height, width = matrices.shape
    outputs = width if back else height
    tile = tile or (LARGE if on_hopper(rows) else SMALL)
    bm, bn, bk = tile.rows, _cut(tile.outputs, outputs), _cut(tile.inputs, inputs)
    out = rows.new_empty(num_rows, outputs)
    line = matrices.stride(1)
    grouped_kernel[((-(-num_rows // bm) + num_groups) * -(-outputs // bn),)](
        TensorDescriptor(rows, [num_rows, inputs], [rows.stride(0), 1], [bm, bk]),
        TensorDescriptor(matrices, [num_groups * height, width], [line, 1], [bk, bn] if back else [bn, bk]),
        ends, out, outputs, height, out.stride(0), K=inputs, G=num_groups, GP=power_of_two(num_groups), BM=bm, BN=bn,
        BK=bk, BACK=back, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out


def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    from stages.kernels.triton_grouped import outer_kernel

    num_left, num_right = left.shape[1], right.shape[1]
    bm, bn = _cut(OUTER.rows, num_left), _cut(OUTER.outputs, num_right)
    out = left.new_empty(len(ends), num_left, num_right)
    outer_kernel[(-(-num_left // bm), -(-num_right // bn), len(ends))](
        left, right, ends, out, left.stride(0), right.stride(0), num_left, num_right,
        BM=bm, BN=bn, BK=OUTER.inputs, STAGES=OUTER.stages, num_warps=OUTER.warps,
    )  # fmt: skip
    return out


def _cut(most: int, size: int) -> int:
    """Of a dimension of this size at once: a power of two, at least what a product on tensor cores takes."""
    return max(16, min(most, power_of_two(size)))
