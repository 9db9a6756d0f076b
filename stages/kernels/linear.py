"""A matrix times the rows of a decode step, by whichever path reads the matrix fastest."""

import torch
from torch import Tensor

from stages.kernels.launch import interpreted, launch_options, power_of_two

FEW_ROWS = 4  # up to here a kernel that gives each output a program of its own is faster than cuBLAS


def linear(x: Tensor, weight: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """x [N, K] @ weight [M, K].T, [N, M] in `dtype`, that of x by default (float32 is the only other)."""
    dtype = dtype or x.dtype
    if x.shape[0] <= FEW_ROWS and (x.is_cuda or interpreted()):
        return few_rows(x, weight, dtype=dtype)
    if dtype == x.dtype:
        return x @ weight.mT
    return torch.mm(x, weight.mT, out_dtype=dtype) if x.is_cuda else (x @ weight.mT).to(dtype)


def few_rows(x: Tensor, weight: Tensor, *, dtype: torch.dtype) -> Tensor:
    """As `linear`, for at most FEW_ROWS rows."""
    from stages.kernels.triton_linear import few_rows_kernel

    num_rows, inputs = x.shape
    num_outputs = weight.shape[0]
    out = torch.empty(num_rows, num_outputs, dtype=dtype, device=x.device)
    outputs = 64 if interpreted() else 1  # a program's; the interpreter's time goes by programs
    few_rows_kernel[(-(-num_outputs // outputs),)](
        x, weight, out, num_outputs, N=num_rows, K=inputs, KP=power_of_two(inputs), BM=outputs,
        **launch_options(x, warps=4),
    )  # fmt: skip
    return out
