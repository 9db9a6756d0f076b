"""What stands between a decoder's blocks: the residual stream in float32, and the RMS norm the next block reads.

Every function updates `residual` float32 [N, D] in place and returns its norm [N, D] in the compute dtype, rounded once
as transformers' GptOssRMSNorm does. Shapes as in the package's docstring.
"""

import torch
from torch import Tensor

from stages.kernels.launch import launch_options, power_of_two


def embed_norm(
    embedding: Tensor,
    tokens: Tensor,
    rows: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    dtype: torch.dtype,
    eps: float,
) -> Tensor:
    """Begins the stream with the embeddings [V, D] (on the card, or in pinned memory) of tokens int64 [S] at rows int32
    [N].
    """
    from stages.kernels.triton_norms import embed_norm_kernel

    num_rows, width = residual.shape
    out = torch.empty(num_rows, width, dtype=dtype, device=residual.device)
    embed_norm_kernel[(num_rows,)](
        embedding, tokens, rows, residual, weight, out, eps, D=width, DP=power_of_two(width),
        **launch_options(out, warps=8),
    )  # fmt: skip
    return out


def add_norm(
    residual: Tensor,
    delta: Tensor,
    bias: Tensor,
    b: Tensor | None,
    weight: Tensor,
    *,
    dtype: torch.dtype,
    scale: float,
    eps: float,
) -> Tensor:
    """Adds a projection's output: delta [N, D + r], bias [D], and LoRA's b [D, r] on the last r columns of delta."""
    from stages.kernels.triton_norms import add_norm_kernel

    num_rows, width = residual.shape
    rank = 0 if b is None else b.shape[1]
    out = torch.empty(num_rows, width, dtype=dtype, device=residual.device)
    add_norm_kernel[(num_rows,)](
        residual, delta, bias, delta if b is None else b, weight, out, eps, scale, D=width, DP=power_of_two(width),
        R=rank, RP=power_of_two(max(rank, 1)), **launch_options(out, warps=8),
    )  # fmt: skip
    return out


def combine_norm(
    residual: Tensor, partials: Tensor, routing: Tensor, weight: Tensor, *, dtype: torch.dtype, eps: float
) -> Tensor:
    """Adds the experts' outputs: partials float32 [parts, N * k, D], weighted by routing float32 [N, k]."""
    from stages.kernels.triton_norms import combine_norm_kernel

    num_rows, width = residual.shape
    out = torch.empty(num_rows, width, dtype=dtype, device=residual.device)
    combine_norm_kernel[(num_rows,)](
        residual, partials, routing, weight, out, partials.stride(0), eps, D=width, DP=power_of_two(width),
        TOPK=routing.shape[1], PARTS=partials.shape[0], **launch_options(out, warps=8),
    )  # fmt: skip
    return out
