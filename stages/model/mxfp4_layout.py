"""MXFP4 weights in the order a tensor core reads them: the same bytes as the checkpoint's, moved.

Rows are taken 16 at a time and inputs 256 at a time (what remains, 64 at a time), so that a thread's share of a matrix
product's weights is 16 contiguous bytes, and the four codes of a 16-bit word are the same place of four products:

- word `w` of a block of 4 n inputs holds the codes of inputs w, n + w, 2n + w and 3n + w (n is 64 or 16). Their sign
  and magnitude bits lie where one mask finds them after a shift of 0, 3 or 6 bits, as a bfloat16 that is 2^126 too
  small; the fourth's lie in the bits that are left.
- words of 16 rows x 16 places lie in the order of an mma.m16n8k16 operand (PTX ISA, "Matrix Fragments for
  mma.m16n8k16"): row bits 2-0, place bits 2-1, place bit 3, row bit 3, place bit 0.
- a scale byte s is kept as s + 126, the exponent of the bfloat16 2^(s - 1) that finishes a weight, four to an int32.
- of a gate_up matrix, whose gates and ups alternate, each 16 rows hold 8 gates and then their 8 ups, so that both
  meet in one thread.

Shapes: E experts, M outputs (a multiple of 16), K inputs (a multiple of 64). Scales above 128, weights of 2^1 and more,
have no place here; the published checkpoints have none.
"""

import torch
from torch import Tensor

from stages.kernels.packed_experts import ROWS, Relaid
from stages.model.mxfp4 import Mxfp4

LARGEST_SCALE = 128
SCALE_OFFSET = 126
CHUNK = 4  # experts moved at once; their codes lie in memory a byte each meanwhile


def fits(quantized: Mxfp4) -> bool:
    """Whether the matrices [E, M, K] can be held in this order."""
    rows, num_blocks = quantized.scales.shape[-2:]
    return rows % ROWS == 0 and num_blocks % 2 == 0 and int(quantized.scales.max()) <= LARGEST_SCALE


def relay(quantized: Mxfp4, *, interleaved: bool) -> Relaid:
    """The matrices in this order. Raises ValueError when they do not fit it."""
    if not fits(quantized):
        shape, largest = tuple(quantized.scales.shape), int(quantized.scales.max())
        raise ValueError(
            f"MXFP4 scales {shape} with bytes up to {largest}: rows must be a multiple of {ROWS}, inputs of 64, "
            f"bytes at most {LARGEST_SCALE}"
        )
    blocks, held = quantized
    num_experts, num_rows, num_blocks = held.shape
    tiles = num_rows // ROWS
    # Made before anything that is soon freed, in whose place on a card they would lie and keep it from being freed.
    words = torch.empty(num_experts, tiles, 128 * num_blocks, dtype=torch.int16, device=blocks.device)
    scales = torch.empty(num_experts, tiles, 4 * num_blocks, dtype=torch.int32, device=blocks.device)
    for start in range(0, num_experts, CHUNK):
        some = slice(start, start + CHUNK)
        words[some], scales[some] = _relay(blocks[some], held[some], interleaved)
    return Relaid(words, scales, interleaved)


def restore(relaid: Relaid) -> Mxfp4:
    """The checkpoint's own bytes."""
    parts = [
        _restore(relaid.words[start : start + CHUNK], relaid.scales[start : start + CHUNK], relaid.interleaved)
        for start in range(0, relaid.words.shape[0], CHUNK)
    ]
    return Mxfp4(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _relay(blocks: Tensor, scales: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    num_experts, rows, num_blocks = scales.shape
    inputs = num_blocks * 32
    tiles, large, small = rows // ROWS, inputs // 256, inputs % 256 // 64
    codes = _by_row_bits(torch.stack((blocks & 0xF, blocks >> 4), dim=-1).view(num_experts, rows, inputs), interleaved)
    # [E, tile, row bits 2-0, row bit 3, block, place of the code in its word, 16 words, bit 3, bits 2-1, bit 0]
    first = codes[..., : large * 256].reshape(num_experts, tiles, 8, 2, large, 4, 4, 2, 4, 2)
    last = codes[..., large * 256 :].reshape(num_experts, tiles, 8, 2, small, 4, 1, 2, 4, 2)
    words = [
        _pack(part).permute(0, 1, 4, 5, 2, 7, 6, 3, 8).reshape(num_experts, tiles, -1)
        for part in (first, last)
        if part.numel()
    ]
    held = _by_row_bits((scales + SCALE_OFFSET).to(torch.uint8), interleaved)
    first = held[..., : large * 8].reshape(num_experts, tiles, 8, 2, large, 4, 2).permute(0, 1, 4, 2, 6, 3, 5)
    last = held[..., large * 8 :].reshape(num_experts, tiles, 8, 2, small, 2).permute(0, 1, 4, 2, 3, 5)
    packed = [
        part.reshape(num_experts, tiles, -1, 4).contiguous().view(torch.int32).squeeze(-1) for part in (first, last)
    ]
    return torch.cat(words, dim=-1), torch.cat(packed, dim=-1)


def _restore(words: Tensor, scales: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    num_experts, tiles, num_words = words.shape
    inputs = num_words // 4
    large, small = inputs // 256, inputs % 256 // 64
    first = words[..., : large * 1024].reshape(num_experts, tiles, large, 4, 8, 4, 2, 2, 2)
    last = words[..., large * 1024 :].reshape(num_experts, tiles, small, 1, 8, 4, 2, 2, 2)
    codes = torch.cat(
        [
            _unpack(part.permute(0, 1, 4, 7, 2, 3, 6, 5, 8)).reshape(num_experts, tiles, 8, 2, -1)
            for part in (first, last)
            if part.numel()
        ],
        dim=-1,
    )
    codes = _by_rows(codes, interleaved).view(num_experts, tiles * ROWS, inputs // 32, 16, 2)
    blocks = codes[..., 0] | (codes[..., 1] << 4)
    held = scales.contiguous().view(torch.uint8).view(num_experts, tiles, -1)
    first = held[..., : large * 128].reshape(num_experts, tiles, large, 8, 2, 2, 4).permute(0, 1, 3, 5, 2, 6, 4)
    last = held[..., large * 128 :].reshape(num_experts, tiles, small, 8, 2, 2).permute(0, 1, 3, 4, 2, 5)
    both = torch.cat([part.reshape(num_experts, tiles, 8, 2, -1) for part in (first, last)], dim=-1)
    return blocks, (_by_rows(both, interleaved) - SCALE_OFFSET).to(torch.uint8)


def _by_row_bits(values: Tensor, interleaved: bool) -> Tensor:
    """[E, M, n] as [E, M / 16, row bits 2-0, row bit 3, n] of the stored rows."""
    shape = (values.shape[0], values.shape[1] // ROWS, 8, 2, values.shape[2])
    if interleaved:
        return values.reshape(shape)
    return values.reshape(shape[0], shape[1], 2, 8, shape[4]).transpose(2, 3)


def _by_rows(values: Tensor, interleaved: bool) -> Tensor:
    """The inverse of `_by_row_bits`."""
    num_experts, tiles, _, _, size = values.shape
    return (values if interleaved else values.transpose(2, 3)).reshape(num_experts, tiles * ROWS, size)


def _pack(codes: Tensor) -> Tensor:
    """int16 words of codes uint8 whose dimension 5 counts the four codes of a word."""
    words = torch.zeros_like(codes.select(5, 0), dtype=torch.int32)
    for place in range(4):
        code = codes.select(5, place).to(torch.int32)
        sign, magnitude = code >> 3, code & 7
        if place < 3:
            words |= (sign << (15 - 3 * place)) | (magnitude << (6 - 3 * place))
        else:
            words |= (sign << 14) | ((magnitude >> 2) << 13) | ((magnitude & 3) << 10)
    return words.to(torch.int16)


def _unpack(words: Tensor) -> Tensor:
    """The inverse of `_pack`: [E, tile, 8, 2, block, 16 words, ...] to codes with a dimension 5 of four."""
    bits = words.to(torch.int32)
    codes = [((bits >> (15 - 3 * p) & 1) << 3) | (bits >> (6 - 3 * p) & 7) for p in range(3)]
    codes.append(((bits >> 14 & 1) << 3) | ((bits >> 13 & 1) << 2) | (bits >> 10 & 3))
    return torch.stack(codes, dim=5).to(torch.uint8)
