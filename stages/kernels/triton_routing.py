"""Triton kernels that route tokens to experts and sort them into tiles, without a word to the host."""

import triton
import triton.language as tl


@triton.jit
def router_kernel(
    x, weight, bias, logits, D: tl.constexpr, E: tl.constexpr, EB: tl.constexpr, DP: tl.constexpr, PDL: tl.constexpr
):
    """The router's logits float32 [N, E]. Grid (N, E / EB); DP: D up to a power of two."""
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
    tl.store(logits + row * E + expert, total)


@triton.jit
def top_k_kernel(
    logits, indices, weights, order, tiles, E: tl.constexpr, TOPK: tl.constexpr, ALONE: tl.constexpr, PDL: tl.constexpr
):
    """A token's TOPK experts, the likeliest first, ties to the lower, and the softmax over them. Grid (N,).

    ALONE: writes each assignment as a tile of its own, too, so that nothing remains to be sorted.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    expert = tl.arange(0, E)
    left = tl.load(logits + row * E + expert)
    largest = tl.max(left, axis=0)
    total = tl.zeros([], tl.float32)
    for choice in tl.static_range(TOPK):
        best = tl.max(left, axis=0)
        chosen = tl.min(tl.where(left == best, expert, E), axis=0)
        total += tl.exp(best - largest)
        left = tl.where(expert == chosen, float("-inf"), left)
        place = row * TOPK + choice
        tl.store(indices + place, chosen)
        if ALONE:
            tl.store(order + place, place)
            tl.store(tiles + place * 3, chosen)
            tl.store(tiles + place * 3 + 1, place)
            tl.store(tiles + place * 3 + 2, 1)
    left = tl.load(logits + row * E + expert)
    for choice in tl.static_range(TOPK):
        best = tl.max(left, axis=0)
        chosen = tl.min(tl.where(left == best, expert, E), axis=0)
        left = tl.where(expert == chosen, float("-inf"), left)
        tl.store(weights + row * TOPK + choice, tl.exp(best - largest) / total)


@triton.jit
def sort_kernel(
    indices, order, tiles, num_assigned, num_tiles,
    E: tl.constexpr, AP: tl.constexpr, TP: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One expert's assignments in their order, and its tiles of at most BN of them. Grid (E,).

    indices int32 [A]; order int32 [A]; tiles int32 [T, 3]: expert, first place in `order`, count (0: no tile). AP and
    TP are A and T up to powers of two.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    mine = tl.program_id(0)
    place = tl.arange(0, AP)
    chosen = tl.load(indices + place, mask=place < num_assigned, other=E)
    expert = tl.arange(0, E)
    counts = tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tiles_of = (counts + BN - 1) // BN
    start = tl.sum(tl.where(expert < mine, counts, 0), axis=0)
    first_tile = tl.sum(tl.where(expert < mine, tiles_of, 0), axis=0)
    count = tl.sum(tl.where(expert == mine, counts, 0), axis=0)
    taken = chosen == mine
    rank = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    tl.store(order + start + rank, place, mask=taken)

    tile = tl.arange(0, TP)
    size = tl.minimum(count - tile * BN, BN)
    where = tiles + (first_tile + tile) * 3
    exists = size > 0
    tl.store(where, mine + tl.zeros_like(tile), mask=exists)
    tl.store(where + 1, start + tile * BN, mask=exists)
    tl.store(where + 2, size, mask=exists)
    if mine == E - 1:
        unused = (tile >= tl.sum(tiles_of, axis=0)) & (tile < num_tiles)
        for part in tl.static_range(3):
            tl.store(tiles + tile * 3 + part, tl.zeros_like(tile), mask=unused)


@triton.jit
def count_kernel(indices, counts, num_assigned, num_blocks, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr):
    """counts int32 [E, blocks] of the experts among each BLOCK of assignments int64. Grid (blocks,);
    EP: E up to a power of two.
    """
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(indices + at, mask=at < num_assigned, other=EP).to(tl.int32)
    expert = tl.arange(0, EP)
    found = tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(counts + expert * num_blocks + block, found, mask=expert < E)


@triton.jit
def place_kernel(
    indices, counts, ends, assigned, owner, places, num_assigned, num_blocks,
    E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sorts assignments by expert, those of one in their order; int64. ends: the running sum of counts. Grid (blocks,).

    assigned: which assignment stands at a place, owner: whose it is, places: where an assignment stands.
    """
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_assigned
    chosen = tl.load(indices + at, mask=inside, other=EP).to(tl.int32)
    expert = tl.arange(0, EP)
    mine = (chosen[:, None] == expert[None, :]).to(tl.int32)
    where = expert * num_blocks + block
    start = tl.load(ends + where, mask=expert < E, other=0) - tl.load(counts + where, mask=expert < E, other=0)
    place = tl.sum(mine * (tl.cumsum(mine, axis=0) - 1 + start[None, :]), axis=1).to(tl.int64)
    tl.store(assigned + place, at.to(tl.int64), mask=inside)
    tl.store(owner + place, chosen.to(tl.int64), mask=inside)
    tl.store(places + at, place, mask=inside)
