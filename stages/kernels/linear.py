"""A matrix times the rows of a decode step, each row's sum in the same order whatever rows there are beside it."""

from typing import NamedTuple

import torch
from torch import Tensor

from stages.kernels.launch import interpreted, launch_options


class Tile(NamedTuple):
    """How a step of at most `rows` rows is cut."""

    rows: int
    outputs: int  # of a program
    columns: int  # rows of x of a program
    inputs: int  # of a turn of its loop
    warps: int
    stages: int


# Measured on one H200 with gpt-oss-20b's shapes, see tests/bench/tune_linear.py.
TILES = (
    Tile(8, 16, 8, 128, 1, 5),
    Tile(16, 64, 16, 64, 4, 5),
    Tile(32, 64, 32, 64, 4, 5),
    Tile(64, 64, 64, 64, 4, 4),
    Tile(1 << 30, 128, 128, 64, 8, 3),
)


def linear(x: Tensor, weight: Tensor, *, dtype: torch.dtype | None = None, tile: Tile | None = None) -> Tensor:
    """x [N, K] @ weight [M, K].T, [N, M] in `dtype`, that of x by default; sums are float32.

    A row's result has the same bits in any company. On a CPU without Triton's interpreter it is PyTorch's product.
    """
    num_rows, inputs = x.shape
    num_outputs = weight.shape[0]
    dtype = dtype or x.dtype
    if not (x.is_cuda or interpreted()):
        return (x @ weight.mT).to(dtype)
    from stages.kernels.triton_linear import linear_kernel

    tile = tile or next(tile for tile in TILES if num_rows <= tile.rows)
    out = torch.empty(num_rows, num_outputs, dtype=dtype, device=x.device)
    linear_kernel[(-(-num_outputs // tile.outputs), -(-num_rows // tile.columns))](
        x, weight, out, num_rows, num_outputs, K=inputs, BM=tile.outputs, BN=tile.columns, BK=tile.inputs,
        STAGES=tile.stages, **launch_options(x, warps=tile.warps),
    )  # fmt: skip
    return out
