"""A Triton kernel that goes over a tile of logits: softmax's running figures, and the exponentials."""

import triton
import triton.language as tl


@triton.jit
def accumulate_kernel(
    logits, targets, largest, total, weighted, chosen, shrinks, exponentials, width, first, inverse_temperature,
    WANTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds logits float32 [n, width], columns `first` ... of the vocabulary, to each row's largest logit, sum of
    exponentials, their sum weighted by the logits, and to the logit of its target. shrinks [n]: what sums over earlier
    tiles are to be multiplied by; exponentials [n, width], if wanted: this tile's, below the largest logit. Grid (n,).
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    target = tl.load(targets + row) - first
    before = tl.load(largest + row)
    found = tl.load(chosen + row)
    if (target >= 0) & (target < width):
        found = tl.load(logits + target) * inverse_temperature
    highest = before
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < width, other=-float("inf")) * inverse_temperature
        highest = tl.maximum(highest, tl.max(x, axis=0))
    shrink = tl.exp(before - highest)
    sum_exp = tl.load(total + row) * shrink
    sum_weighted = tl.load(weighted + row) * shrink
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        x = tl.load(logits + column, mask=inside, other=-float("inf")) * inverse_temperature
        terms = tl.exp(x - highest)
        sum_exp += tl.sum(terms, axis=0)
        sum_weighted += tl.sum(tl.where(inside, terms * x, 0.0), axis=0)
        if WANTED:
            tl.store(exponentials + row * width + column, terms.to(exponentials.dtype.element_ty), mask=inside)
    tl.store(largest + row, highest)
    tl.store(total + row, sum_exp)
    tl.store(weighted + row, sum_weighted)
    tl.store(chosen + row, found)
    tl.store(shrinks + row, shrink)
