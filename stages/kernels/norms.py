"""What stands between a decoder's blocks: the residual stream in float32, and the RMS norm the next block reads.

The engine's functions update `residual` float32 [N, D] in place and return its norm [N, D] in the compute dtype,
rounded once as transformers' GptOssRMSNorm does; `rms_norm` and its backward are the trainer's. Shapes as in the
package's docstring.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.kernels.launch import Path, applied, launch_options, power_of_two


def embed(embedding: Tensor, tokens: Tensor) -> Tensor:
    """Rows [n, D] of the embedding [V, D], which lies on the card or in pinned memory, for tokens int64 [n] on the
    card.
    """
    from stages.kernels.triton_experts import gather_kernel

    width = embedding.shape[1]
    out = torch.empty(len(tokens), width, dtype=embedding.dtype, device=tokens.device)
    gather_kernel[(len(tokens),)](embedding, tokens, out, width, TOPK=1, K=width, BLOCK=1024, num_warps=4)
    return out


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
    """Adds a projection's output: delta [parts, N, D + r], to be summed, bias [D], and LoRA's b [D, r] on the last r
    columns of delta.
    """
    from stages.kernels.triton_norms import add_norm_kernel

    num_rows, width = residual.shape
    rank = 0 if b is None else b.shape[1]
    out = torch.empty(num_rows, width, dtype=dtype, device=residual.device)
    add_norm_kernel[(num_rows,)](
        residual, delta, bias, delta if b is None else b, weight, out, delta.stride(0), eps, scale,
        D=width, DP=power_of_two(width), R=rank, RP=power_of_two(max(rank, 1)), PARTS=delta.shape[0],
        **launch_options(out, warps=8),
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


def rms_norm(x: Tensor, weight: Tensor, *, dtype: torch.dtype, eps: float, path: Path = "auto") -> Tensor:
    """The norm [N, D] in `dtype` of x [N, D], worked out in float32; differentiable in x."""
    out: Tensor = applied(_RmsNorm, x, weight, dtype, eps, path)
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, dtype, eps, path):
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.path = eps, path
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        write_rms_norm(x, weight, out, eps=eps, path=path)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        add_rms_norm_grad(x, weight, grad, out, eps=ctx.eps, path=ctx.path)
        return out.to(x.dtype), None, None, None, None


def write_rms_norm(x: Tensor, weight: Tensor, out: Tensor, *, eps: float, path: Path = "auto") -> None:
    """Writes the norm of x [N, D] to out [N, D], behind autograd's back."""
    if not (x.is_cuda or path == "triton"):
        out.data.copy_(F.rms_norm(x.float(), weight.shape, weight.float(), eps))
        return
    from stages.kernels.triton_norms import norm_kernel

    num_rows, width = x.shape
    norm_kernel[(num_rows,)](x, weight, out, eps, D=width, DP=power_of_two(width), num_warps=8)


def advance(
    stream: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    rounded: Tensor,
    *,
    eps: float,
    path: Path = "auto",
) -> Tensor:
    """Adds a block's output [N, D], if there is one, to the stream float32 [N, D] in place, writes the stream to
    `rounded` [N, D], and returns its norm [N, D] in the dtype of `rounded`.
    """
    normed = torch.empty_like(rounded)
    if not (stream.is_cuda or path == "triton"):
        if delta is not None:
            stream += delta
        rounded.copy_(stream)
        write_rms_norm(stream, weight, normed, eps=eps)
        return normed
    from stages.kernels.triton_norms import advance_kernel

    num_rows, width = stream.shape
    advance_kernel[(num_rows,)](
        stream, stream if delta is None else delta, weight, rounded, normed, eps,
        D=width, DP=power_of_two(width), ADD=delta is not None, num_warps=8,
    )  # fmt: skip
    return normed


def add_rms_norm_grad(x: Tensor, weight: Tensor, grad: Tensor, out: Tensor, *, eps: float, path: Path = "auto") -> None:
    """Adds to out float32 [N, D] the gradient of x [N, D] that follows from the norm's."""
    if x.is_cuda or path == "triton":
        from stages.kernels.triton_norms import norm_backward_kernel

        num_rows, width = x.shape
        norm_backward_kernel[(num_rows,)](
            x, weight, grad.contiguous(), out, eps, D=width, DP=power_of_two(width), num_warps=8
        )
        return
    values, scaled = x.float(), grad.float() * weight.float()
    inverse = (values.square().mean(-1, keepdim=True) + eps).rsqrt()
    along = (values * scaled).mean(-1, keepdim=True) * inverse.square()
    out.add_((scaled - values * along) * inverse)
