"""MXFP4, the number format of gpt-oss's experts: four-bit values in blocks of 32 that share one power of two.

Source: OCP Microscaling Formats (MX) v1.0, section 5.3, and the published gpt-oss checkpoints. A value is one of
{0, .5, 1, 1.5, 2, 3, 4, 6} with a sign (E2M1); its block's scale byte s (E8M0) multiplies it by 2^(s - 127). Two values
share a byte: the low nibble holds the even k, the high nibble the odd k.

Does not cover NaN scales (byte 255): `dequantize` refuses them.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 32  # values that share a scale
SCALE_BIAS = 127
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Halfway points between neighbouring magnitudes; a tie goes to the neighbour with an even code, as IEEE rounding does.
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


class Mxfp4(NamedTuple):
    """A weight [..., K] as the checkpoint stores it.

    Example:
        Mxfp4(blocks=uint8 [32, 5760, 90, 16], scales=uint8 [32, 5760, 90])   # gate_up of gpt-oss-20b, K = 2880
    """

    blocks: Tensor  # uint8 [..., K / 32, 16]
    scales: Tensor  # uint8 [..., K / 32]


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [..., K] in `dtype`; exact in float32 and bfloat16 (float16 keeps what its exponent range can hold).

    Raises ValueError when shapes or types do not fit, or a scale is NaN.
    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"MXFP4 blocks and scales are uint8, got {blocks.dtype} and {scales.dtype}")
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1] != BLOCK // 2:
        shapes = f"{tuple(blocks.shape)} and {tuple(scales.shape)}"
        raise ValueError(f"MXFP4 blocks [..., K/32, 16] need scales [..., K/32], got {shapes}")
    if bool((scales == 255).any()):
        raise ValueError("an MXFP4 scale is 255 (NaN)")
    values = torch.tensor(MAGNITUDES + tuple(-m for m in MAGNITUDES), dtype=torch.float32, device=blocks.device)
    byte = torch.arange(256, device=blocks.device)
    pairs = torch.stack((values[byte & 0xF], values[byte >> 4]), dim=-1)  # even k low, odd k high
    exponents = scales.to(torch.int32).unsqueeze(-1) - SCALE_BIAS
    powers = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    return F.embedding(blocks.to(torch.int32), pairs).flatten(-2).mul_(powers).flatten(-2).to(dtype)


def quantize(weight: Tensor) -> Mxfp4:
    """The nearest MXFP4 to `weight` [..., K], K a multiple of 32.

    Each block takes the better, by squared error, of two scales: the one that puts its largest magnitude in [4, 8) and
    the one that puts it in [2, 4). The first saturates what exceeds 6, the second spends a bit of range instead. A
    weight already on the grid comes back with the same values (not always with the same bytes). Raises ValueError on a
    K that is no multiple of 32 or on values that are not finite.
    """
    if weight.shape[-1] % BLOCK:
        raise ValueError(f"MXFP4 needs the last dimension to be a multiple of {BLOCK}, got {weight.shape[-1]}")
    values = weight.detach().to(torch.float32).unflatten(-1, (-1, BLOCK))
    if not bool(torch.isfinite(values).all()):
        raise ValueError("MXFP4 cannot hold values that are not finite")
    largest = values.abs().amax(-1)
    # frexp gives largest = m * 2^e with m in [0.5, 1): floor(log2(largest)) = e - 1, exactly, subnormals included.
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent - 1 - 2, -SCALE_BIAS)
    fine = exponent.clamp(-SCALE_BIAS, SCALE_BIAS)
    coarse = (exponent + 1).clamp(-SCALE_BIAS, SCALE_BIAS)
    fine_codes, fine_error = _round(values, fine)
    coarse_codes, coarse_error = _round(values, coarse)
    take_coarse = coarse_error < fine_error
    codes = torch.where(take_coarse.unsqueeze(-1), coarse_codes, fine_codes)
    scales = (torch.where(take_coarse, coarse, fine) + SCALE_BIAS).to(torch.uint8)
    return Mxfp4(blocks=codes[..., 0::2] | (codes[..., 1::2] << 4), scales=scales)


def _round(values: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., 32] nearest to `values` / 2^exponent, and each block's squared error in units of its values."""
    scaled = torch.ldexp(values, -exponent.unsqueeze(-1))
    magnitude = scaled.abs().contiguous()
    midpoints = torch.tensor(MIDPOINTS, dtype=torch.float32, device=values.device)
    # bucketize(right=False) sends a tie down, right=True up: ties at an odd lower code go up to the even one.
    down = torch.bucketize(magnitude, midpoints, right=False)
    up = torch.bucketize(magnitude, midpoints, right=True)
    code = torch.where(down % 2 == 0, down, up)
    table = torch.tensor(MAGNITUDES, dtype=torch.float32, device=values.device)
    error = torch.ldexp((table[code] - magnitude), exponent.unsqueeze(-1)).square().sum(-1)
    return (code + 8 * torch.signbit(scaled)).to(torch.uint8), error
