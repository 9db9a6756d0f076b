"""A Triton kernel that turns the channels of queries or keys by their position."""

import triton
import triton.language as tl


@triton.jit
def rotate_kernel(x, cos, sin, out, H: tl.constexpr, HP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr):
    """out [T, H, 2 C] = x turned by cos and sin float32 [T, C], the first C channels against the others; out
    may be x. Grid (T,).

    HP, CP: H and C up to powers of two.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HP)[:, None]
    channel = tl.arange(0, CP)[None, :]
    inside = (head < H) & (channel < C)
    at = token * (H * 2 * C) + head * (2 * C) + channel
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + C, mask=inside, other=0.0).to(tl.float32)
    cosine = tl.load(cos + token * C + channel, mask=channel < C, other=0.0)
    sine = tl.load(sin + token * C + channel, mask=channel < C, other=0.0)
    tl.store(out + at, (first * cosine - second * sine).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + C, (second * cosine + first * sine).to(out.dtype.element_ty), mask=inside)
