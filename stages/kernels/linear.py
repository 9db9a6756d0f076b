"""A matrix times the rows of a decode step, each row's sum in the same order whatever rows there are beside it."""

from typing import NamedTuple

import torch
from torch import Tensor

from stages.kernels.launch import interpreted, launch_options


class Tile(NamedTuple):
    """How a step of at most `rows` rows is cut. None of it changes a bit."""

    rows: int
    outputs: int  # of a program
    columns: int  # rows of x of a program
    inputs: int  # of a turn of its loop
    warps: int
    stages: int
    early: bool = False  # the first weights are asked for before x is there


# Measured on one H200 with gpt-oss-20b's shapes, see tests/bench/tune_linear.py. Above the last, cuBLAS is faster; from
# so many rows on it does not split the inputs, and then its sums have the same order (tests/test_gpu_engine.py).
TILES = (
    Tile(8, 64, 8, 128, 4, 4, early=True),
    Tile(16, 64, 16, 64, 4, 8),
    Tile(32, 64, 32, 64, 4, 5),
    Tile(96, 64, 64, 128, 4, 4),
)


def linear(x: Tensor, weight: Tensor, *, dtype: torch.dtype | None = None, tile: Tile | None = None) -> Tensor:
    """x [N, K] @ weight [M, K].T, [N, M] in `dtype`, that of x by default; sums are float32.

    A row's result has the same bits in any company. On a CPU without Triton's interpreter it is PyTorch's product.
    """
    return linear_parts(x, weight, parts=1, dtype=dtype or x.dtype, tile=tile)[0]


def linear_parts(
    x: Tensor, weight: Tensor, *, parts: int, dtype: torch.dtype = torch.float32, tile: Tile | None = None
) -> Tensor:
    """As `linear`, over each of so many equal parts of the inputs: [parts, N, M], whose sum is the product.

    A matrix of few outputs fills the card so.
    """
    num_rows, inputs = x.shape
    num_outputs = weight.shape[0]
    if inputs % parts:
        raise ValueError(f"{inputs} inputs cannot be cut into {parts} equal parts")
    if tile is None:
        tile = next((tile for tile in TILES if num_rows <= tile.rows), None)
    if not (x.is_cuda or interpreted()) or tile is None:
        pieces = zip(x.chunk(parts, dim=1), weight.chunk(parts, dim=1), strict=True)
        return torch.stack([_product(rows, matrix, dtype) for rows, matrix in pieces])
    from stages.kernels.triton_linear import linear_kernel

    out = torch.empty(parts, num_rows, num_outputs, dtype=dtype, device=x.device)
    linear_kernel[(-(-num_outputs // tile.outputs), -(-num_rows // tile.columns), parts)](
        x, weight, out, num_rows, num_outputs, K=inputs, PARTS=parts, BM=tile.outputs, BN=tile.columns, BK=tile.inputs,
        STAGES=tile.stages, EARLY=tile.early and inputs // parts >= tile.inputs, **launch_options(x, warps=tile.warps),
    )  # fmt: skip
    return out


def _product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if x.is_cuda and x.dtype != dtype:
        return torch.mm(x, weight.mT, out_dtype=dtype)
    return (x @ weight.mT).to(dtype)
