"""RoPE of queries and keys for training, half against half of the channels (Su et al. 2021; transformers' gpt-oss)."""

import torch
from torch import Tensor

from stages.kernels.launch import Path, applied, power_of_two


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, path: Path = "auto") -> tuple[Tensor, Tensor]:
    """query [T, H, C] and key [T, K, C] turned by cos and sin float32 [T, C / 2], in their own dtype; the arithmetic is
    float32.
    """
    query, key = applied(_Rotate, query.contiguous(), key.contiguous(), cos, sin, path)
    return query, key


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, cos, sin, path):
        ctx.save_for_backward(cos, sin)
        ctx.path = path
        if not (query.is_cuda or path == "triton"):
            return _turned_plainly(query, cos, sin), _turned_plainly(key, cos, sin)
        turned = torch.empty_like(query), torch.empty_like(key)
        _turn(query, key, cos, sin, *turned, back=False)
        return turned

    @staticmethod
    def backward(ctx, of_query, of_key):
        cos, sin = ctx.saved_tensors
        if not (of_query.is_cuda or ctx.path == "triton"):
            return _turned_plainly(of_query, cos, -sin), _turned_plainly(of_key, cos, -sin), None, None, None
        of_query, of_key = of_query.contiguous(), of_key.contiguous()
        _turn(of_query, of_key, cos, sin, of_query, of_key, back=True)  # in place: nobody else is given these gradients
        return of_query, of_key, None, None, None


def _turn(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, query_out: Tensor, key_out: Tensor, *, back: bool
) -> None:
    from stages.kernels.triton_rotary import rotate_kernel

    tokens, heads, channels = query.shape
    key_heads, half = key.shape[1], channels // 2
    rotate_kernel[(tokens,)](
        query, key, cos, sin, query_out, key_out, H=heads, HP=power_of_two(heads), K=key_heads,
        KP=power_of_two(key_heads), C=half, CP=power_of_two(half), BACK=back,
    )  # fmt: skip


def _turned_plainly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
