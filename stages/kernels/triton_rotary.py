"""A Triton kernel that turns the channels of queries and keys by their position."""

import triton
import triton.language as tl


@triton.jit
def rotate_kernel(
    query, key, cos, sin, query_out, key_out, H: tl.constexpr, HP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """query_out [T, H, 2 C] and key_out [T, K, 2 C] = query and key turned by cos and sin float32 [T, C], the first C
    channels against the others; BACK: the other way round. Grid (T,).

    HP, KP, CP: H, K and C up to powers of two.
    """
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, CP)[None, :]
    cosine = tl.load(cos + token * C + channel, mask=channel < C, other=0.0)
    sine = tl.load(sin + token * C + channel, mask=channel < C, other=0.0)
    if BACK:
        sine = -sine
    _turn(query, query_out, token, cosine, sine, channel, H, HP, C)
    _turn(key, key_out, token, cosine, sine, channel, K, KP, C)


@triton.jit
def _turn(x, out, token, cosine, sine, channel, H: tl.constexpr, HP: tl.constexpr, C: tl.constexpr):
    """A token's H heads."""
    head = tl.arange(0, HP)[:, None]
    inside = (head < H) & (channel < C)
    at = token * (H * 2 * C) + head * (2 * C) + channel
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + C, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (first * cosine - second * sine).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + C, (second * cosine + first * sine).to(out.dtype.element_ty), mask=inside)
