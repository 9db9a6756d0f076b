"""Grouped products by the project's kernel and by whichever path a machine takes, against float64 group by group."""

import pytest
import torch

from stages.kernels.grouped import LARGE, SMALL, _product, grouped, grouped_back, grouped_outer
from stages.kernels.launch import aligned_rows
from tests.test_kernels_experts import DEVICE

pytest.importorskip("triton")
PATHS = ["auto", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COUNTS = [[3, 0, 70, 1, 0], [0, 0, 5], [130], [64, 64], [1, 2, 3, 4, 0, 6, 7]]
SIZES = [(16, 24), (80, 136), (40, 6)]  # inputs of a matrix, and its outputs


def drawn(counts, inputs, outputs, dtype):
    """Rows [n, inputs] and [n, outputs] that lie apart, matrices [G, outputs, inputs], ends."""
    generator = torch.Generator().manual_seed(sum(counts) + inputs)
    like = torch.empty(0, dtype=dtype, device=DEVICE)
    found = []
    for shape in ((sum(counts), inputs), (sum(counts), outputs), (len(counts), outputs, inputs)):
        found.append(aligned_rows(*shape, like=like).copy_(torch.randn(shape, generator=generator)))
    return *found, torch.tensor(counts, device=DEVICE).cumsum(0, dtype=torch.int32)


def assert_close(found, groups, dtype):
    """It is these groups' results, but for float32's sums and rounding once."""
    expected = torch.cat(groups)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    error = (found.double() - expected).abs().max()
    assert error <= (torch.finfo(dtype).eps + 1e-6) * expected.abs().max()


def assert_each_group_alone(counts, inputs, outputs, dtype, path, *, exact, first=0):
    """The three products are those of each group alone in the type `exact`; the outer one's rows begin at `first`."""
    rows, others, matrices, ends = drawn(counts, inputs, outputs, dtype)
    parts, others_parts = ([part.to(exact) for part in each.split(counts)] for each in (rows, others))
    straight = [a @ m.mT for a, m in zip(parts, matrices.to(exact), strict=True)]
    assert_close(grouped(rows, matrices, ends, path=path), straight, dtype)
    back = [b @ m for b, m in zip(others_parts, matrices.to(exact), strict=True)]
    assert_close(grouped_back(others, matrices, ends, path=path), back, dtype)
    outer = [(b.mT @ a[:, first:])[None] for a, b in zip(parts, others_parts, strict=True)]
    assert_close(grouped_outer(others, rows[:, first:], ends, path=path), outer, dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("counts", COUNTS)
def test_products_are_those_of_each_group_alone(counts, inputs, outputs, dtype, path):
    assert_each_group_alone(counts, inputs, outputs, dtype, path, exact=torch.float64)


@pytest.mark.parametrize("tile", [LARGE, SMALL])
def test_a_row_has_the_same_bits_whatever_rows_there_are_beside_it(tile):
    rows, _, matrices, ends = drawn([70, 3, 200], 80, 136, torch.float16)
    whole = _product(rows, matrices, ends, back=False, tile=tile)
    some = torch.cat((rows[69:70], rows[72:73], rows[100:103]))
    ends = torch.tensor([1, 2, 5], dtype=torch.int32, device=DEVICE)
    alone = _product(some, matrices, ends, back=False, tile=tile)
    assert torch.equal(alone, torch.cat((whole[69:70], whole[72:73], whole[100:103])))


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_the_card_large_products_are_those_of_each_group_alone(dtype, path):
    counts = [500, 0, 1, 129, 1000, 37, 0, 256]
    assert_each_group_alone(counts, 2896, 1440, dtype, path, exact=torch.float32, first=2880)
