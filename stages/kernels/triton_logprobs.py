"""Triton kernels that go over a tile of logits once: softmax's running figures, and the gradient."""

import triton
import triton.language as tl


@triton.jit
def accumulate_kernel(
    logits, targets, largest, total, weighted, chosen, width, first, inverse_temperature, BLOCK: tl.constexpr
):
    """Adds logits float32 [n, width], columns `first` ... of the vocabulary, to each row's largest logit, sum of
    exponentials, their sum weighted by the logits, and to the logit of its target. Grid (n,).
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    target = tl.load(targets + row) - first
    highest = tl.load(largest + row)
    sum_exp = tl.load(total + row)
    sum_weighted = tl.load(weighted + row)
    found = tl.load(chosen + row)
    if (target >= 0) & (target < width):
        found = tl.load(logits + target) * inverse_temperature
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < width, other=-float("inf")) * inverse_temperature
        higher = tl.maximum(highest, tl.max(x, axis=0))
        shrink = tl.exp(highest - higher)
        exponentials = tl.exp(x - higher)
        sum_exp = sum_exp * shrink + tl.sum(exponentials, axis=0)
        sum_weighted = sum_weighted * shrink + tl.sum(tl.where(column < width, exponentials * x, 0.0), axis=0)
        highest = higher
    tl.store(largest + row, highest)
    tl.store(total + row, sum_exp)
    tl.store(weighted + row, sum_weighted)
    tl.store(chosen + row, found)


@triton.jit
def gradient_kernel(logits, targets, normalizers, grad, out, width, first, inverse_temperature, BLOCK: tl.constexpr):
    """out [n, width] = (1 at the target - softmax) * grad / temperature. Grid (n,)."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row) - first
    normalizer = tl.load(normalizers + row)
    scale = tl.load(grad + row) * inverse_temperature
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * width + column, mask=column < width, other=-float("inf")) * inverse_temperature
        gradient = tl.where(column == target, 1.0, 0.0) - tl.exp(x - normalizer)
        tl.store(out + row * width + column, (gradient * scale).to(out.dtype.element_ty), mask=column < width)
