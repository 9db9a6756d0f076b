"""Triton kernels that route tokens to experts and sort them into tiles, without a word to the host."""

import triton
import triton.language as tl


@triton.jit
def router_kernel(
    x, weight, bias, logits, D: tl.constexpr, E: tl.constexpr, EB: tl.constexpr, DP: tl.constexpr, PDL: tl.constexpr
):
    """The router's logits float32 [N, E], rounded to the type of x. Grid (N, E / EB); DP: D up to a power of two."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * EB + tl.arange(0, EB)
    d = tl.arange(0, DP)
    inside = d < D
    values = tl.load(x + row * D + d, mask=inside, other=0.0).to(tl.float32)
    rows = tl.load(weight + expert[:, None] * D + d[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    total = tl.sum(rows * values[None, :], axis=1) + tl.load(bias + expert).to(tl.float32)
    tl.store(logits + row * E + expert, total.to(x.dtype.element_ty).to(tl.float32))


@triton.jit
def top_k_kernel(
    logits, indices, weights, order, tiles, num_rows, num_tiles,
    E: tl.constexpr, TOPK: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Chooses each token's experts and sorts the choices by expert, in one program.

    logits float32 [N, E]; writes indices int32 and weights float32 [N, TOPK] (softmax over the chosen, the likeliest
    first, ties to the lower expert), order int32 [N * TOPK]: assignments token * TOPK + choice, those of an expert
    together, and tiles int32 [num_tiles, 3]: expert, first place in `order`, count of at most BN (0: no tile). ROWS and
    TILES are N and num_tiles up to powers of two.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.arange(0, ROWS)
    expert = tl.arange(0, E)
    real = row < num_rows
    left = tl.load(logits + row[:, None] * E + expert[None, :], mask=real[:, None], other=0.0)
    counts = tl.zeros([E], tl.int32)
    largest = tl.max(left, axis=1)
    total = tl.zeros([ROWS], tl.float32)
    for choice in tl.static_range(TOPK):
        best = tl.max(left, axis=1)
        chosen = tl.min(tl.where(left == best[:, None], expert[None, :], E), axis=1)
        total += tl.exp(best - largest)
        left = tl.where(expert[None, :] == chosen[:, None], float("-inf"), left)
        tl.store(indices + row * TOPK + choice, chosen, mask=real)
        tl.store(weights + row * TOPK + choice, tl.exp(best - largest), mask=real)
        taken = (expert[None, :] == chosen[:, None]) & real[:, None]
        counts += tl.sum(taken.to(tl.int32), axis=0)
    starts = tl.cumsum(counts, axis=0) - counts
    ends = tl.cumsum((counts + BN - 1) // BN, axis=0)
    first_tile = ends - (counts + BN - 1) // BN

    left = tl.load(logits + row[:, None] * E + expert[None, :], mask=real[:, None], other=0.0)
    before = starts
    for choice in tl.static_range(TOPK):
        best = tl.max(left, axis=1)
        chosen = tl.min(tl.where(left == best[:, None], expert[None, :], E), axis=1)
        left = tl.where(expert[None, :] == chosen[:, None], float("-inf"), left)
        taken = ((expert[None, :] == chosen[:, None]) & real[:, None]).to(tl.int32)
        place = tl.sum(taken * (tl.cumsum(taken, axis=0) - 1 + before[None, :]), axis=1)
        before += tl.sum(taken, axis=0)
        tl.store(order + place, row * TOPK + choice, mask=real)
        tl.store(weights + row * TOPK + choice, tl.exp(best - largest) / total, mask=real)

    tile = tl.arange(0, TILES)
    owner = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), axis=1)
    mine = (expert[None, :] == owner[:, None]).to(tl.int32)
    skipped = (tile - tl.sum(mine * first_tile[None, :], axis=1)) * BN
    size = tl.minimum(tl.sum(mine * counts[None, :], axis=1) - skipped, BN)
    exists = tile < num_tiles
    used = owner < E
    tl.store(tiles + tile * 3, tl.where(used, owner, 0), mask=exists)
    tl.store(tiles + tile * 3 + 1, tl.where(used, tl.sum(mine * starts[None, :], axis=1) + skipped, 0), mask=exists)
    tl.store(tiles + tile * 3 + 2, tl.where(used, size, 0), mask=exists)
