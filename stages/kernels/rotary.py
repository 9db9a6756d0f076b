"""RoPE of queries and keys for training, half against half of the channels (Su et al. 2021; transformers' gpt-oss)."""

import torch
from torch import Tensor

from stages.kernels.launch import applied, power_of_two


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, C] turned by cos and sin float32 [T, C / 2], in its own dtype; the arithmetic is float32."""
    out: Tensor = applied(_Rotate, x, cos, sin)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, torch.empty_like(x)) if x.is_cuda else _turned_plainly(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        if grad.is_cuda:  # in place: nobody else is given this gradient
            grad = grad.contiguous()
            return _turned(grad, cos, -sin, grad), None, None
        return _turned_plainly(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    from stages.kernels.triton_rotary import rotate_kernel

    tokens, heads, channels = x.shape
    rotate_kernel[(tokens,)](
        x.contiguous(), cos, sin, out, H=heads, HP=power_of_two(heads), C=channels // 2, CP=power_of_two(channels // 2)
    )
    return out


def _turned_plainly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
