"""MXFP4 against the values that the format's table gives by hand."""

import pytest
import torch

from stages.model.mxfp4 import MAGNITUDES, Mxfp4, dequantize, quantize


def test_a_byte_holds_the_even_value_low_and_the_odd_value_high() -> None:
    blocks = torch.zeros(1, 16, dtype=torch.uint8)
    blocks[0, 0] = 0x9 << 4 | 0x7  # k = 0: code 7 = 6.0; k = 1: code 9 = -0.5
    blocks[0, 15] = 0xF << 4  # k = 31: code 15 = -6.0
    weight = dequantize(blocks, torch.tensor([129], dtype=torch.uint8), torch.float32)
    assert weight.shape == (32,)
    assert weight[0] == 24.0
    assert weight[1] == -2.0
    assert weight[31] == -24.0
    assert weight[2:31].abs().sum() == 0


def test_every_code_at_every_scale_survives_a_round_trip_by_value() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    blocks = (codes[0::2] | codes[1::2] << 4).expand(252, 1, 16).contiguous()
    scales = torch.arange(1, 253, dtype=torch.uint8)[:, None]  # 6 * 2^126 would overflow float32
    weight = dequantize(blocks, scales, torch.float32)
    assert torch.equal(dequantize(*quantize(weight), torch.float32), weight)
    assert torch.equal(quantize(weight).scales, scales)


def test_ties_go_to_the_even_code_and_large_values_saturate() -> None:
    row = torch.zeros(32)
    row[:9] = torch.tensor([4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -0.75, 6.0])
    expected = torch.tensor([4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, -1.0, 6.0])
    assert torch.equal(dequantize(*quantize(row), torch.float32)[:9], expected)
    row = torch.zeros(32)
    row[0] = 6.5
    row[1:] = 0.5  # keeping the many small values costs less than the saturated one
    assert dequantize(*quantize(row), torch.float32)[0] == 6.0


def test_no_grid_point_is_nearer_than_the_one_chosen() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 96) * torch.logspace(-3, 3, 64)[:, None]
    quantized = quantize(weight)
    scale = torch.exp2(quantized.scales.float() - 127).repeat_interleave(32, dim=-1)
    grid = torch.tensor(sorted({*MAGNITUDES, *(-m for m in MAGNITUDES)}))
    best = (weight[..., None] - grid * scale[..., None]).abs().amin(-1)
    chosen = (weight - dequantize(*quantized, torch.float32)).abs()
    assert torch.equal(chosen, best)


def test_the_better_of_two_scales_is_taken() -> None:
    row = torch.full((32,), 7.9)  # saturating at 6 costs 1.9 each, the coarser scale gives 8
    assert torch.equal(dequantize(*quantize(row), torch.float32), torch.full((32,), 8.0))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="multiple of 32, got 33"):
        quantize(torch.zeros(33))
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.full((32,), float("nan")))
    with pytest.raises(ValueError, match="NaN"):
        dequantize(torch.zeros(1, 16, dtype=torch.uint8), torch.tensor([255], dtype=torch.uint8), torch.float32)
    with pytest.raises(ValueError, match="need scales"):
        dequantize(*Mxfp4(torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8)), torch.float32)


def test_zeros_stay_zeros_and_the_smallest_scale_holds() -> None:
    quantized = quantize(torch.zeros(2, 32))
    assert torch.equal(quantized.scales, torch.zeros(2, 1, dtype=torch.uint8))
    assert torch.equal(dequantize(*quantized, torch.bfloat16), torch.zeros(2, 32, dtype=torch.bfloat16))
