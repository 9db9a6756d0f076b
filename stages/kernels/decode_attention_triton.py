"""The Triton kernel of `decode_attention`: one query token of each row over its cached keys, sinks folded in.

A program is one (KV head, row, split): the G query heads that share a KV head are the rows of one matrix product,
padded to 16. It projects what the GEMM left over (bias, LoRA's second factor), rotates, stores the new key and value,
and runs an online softmax over its split of the cache; the new token is the first key of split 0 and is never read
back. The last program of a row to finish (a ticket tells) adds the splits up in their own order, so the sum does not
depend on who was last. Split-KV: Dao et al. 2023, "Flash-Decoding".

The first tile of keys and values is asked for before the query is projected (EARLY): at small batches the step is a
chain of memory latencies, and that takes one out. Scores are kept in units of log2 e.

Covers bf16, fp16 and float32 (without tensor cores). C must be a power of two of 16 or more, G at most 16.
"""

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

if TYPE_CHECKING:
    from torch import Tensor

    from stages.kernels.decode_attention import LoraB, Workspace

QUERY_ROWS: tl.constexpr = tl.constexpr(16)  # the least rows of a tensor-core product
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
NOTHING: tl.constexpr = tl.constexpr(-1.0e38)  # below every score, and finite: differences of it are no NaN


@triton.jit
def _narrow(x, dtype: tl.constexpr, WIDE: tl.constexpr):
    """x float32 as `dtype`, rounded to the nearest also where the interpreter would cut bf16 off."""
    if WIDE and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _project(
    row,
    column,
    mask,
    bias,
    lora_b,
    lora_row,
    inner,  # [RANKS], LoRA's first factor times the input, zeros beyond RANK
    lora_scale,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One row's columns `column` of the linear layer: the GEMM's output, bias and LoRA added, rounded as it would."""
    x = tl.load(row + column, mask=mask, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    if BIAS:
        x += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    if RANK > 0:
        ranks = tl.arange(0, RANKS)
        pointers = lora_b + tl.expand_dims(lora_row, -1) * RANK + ranks
        factors = tl.load(pointers, mask=tl.expand_dims(mask, -1) & (ranks < RANK), other=0.0).to(tl.float32)
        x += tl.sum(factors * inner, axis=-1) * lora_scale
    return _narrow(x, dtype, WIDE).to(tl.float32)


@triton.jit
def _tile(query, key, value, visible, largest, total, sums, scale, WIDE: tl.constexpr):
    """One step of the online softmax: key and value [N, C] added to (largest [G], total [G], sums [G, C])."""
    if WIDE:  # exact products of the same operands, for the interpreter, which cannot multiply bf16
        query, key = query.to(tl.float32), key.to(tl.float32)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where(visible[None, :], scores, float("-inf"))
    raised = tl.maximum(largest, tl.max(scores, axis=1))
    shrink = tl.exp2(largest - raised)
    weights = tl.exp2(scores - raised[:, None])
    total = total * shrink + tl.sum(weights, axis=1)
    weights = _narrow(weights, value.dtype, WIDE)
    if WIDE:
        weights, value = weights.to(tl.float32), value.to(tl.float32)
    sums = tl.dot(weights, value, acc=sums * shrink[:, None], input_precision="ieee")
    return raised, total, sums


@triton.jit
def _finish(
    out, sinks, head, largest, total, sums, G: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr
):
    """Gives the sinks their share of each softmax and stores the G heads' outputs."""
    group = tl.arange(0, ROWS)
    heads = head * G + group
    sink = tl.load(sinks + heads, mask=group < G, other=0.0).to(tl.float32) * LOG2_E
    raised = tl.maximum(largest, sink)
    shrink = tl.exp2(largest - raised)
    factor = shrink / (total * shrink + tl.exp2(sink - raised))
    place = out + heads[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(place, _narrow(sums * factor[:, None], out.dtype.element_ty, WIDE), mask=group[:, None] < G)


# What is not specialised on would only compile the same code again, for another page table.
@triton.jit(
    do_not_specialize=["table_stride", "splits"],
    do_not_specialize_on_alignment=["rows", "positions", "page_table", "tickets"],
)
def decode_kernel(
    out,  # [b, H * C]
    qkv,  # [b, (H + 2 K) * C + 3 r]
    bias,  # [(H + 2 K) * C]
    lora_q,  # [H * C, r]
    lora_k,  # [K * C, r]
    lora_v,  # [K * C, r]
    cos,  # [max_positions, C / 2]
    sin,
    sinks,  # [H]
    keys,  # [pages, K, PAGE, C], in a ring [slots + 1, K, PAGE, C]
    values,
    rows,  # [b]
    positions,  # [slots + 1]
    page_table,  # [slots + 1, P]
    partial_sums,  # [b * splits, K, G, C]
    partial_largest,  # [b * splits, K, G]
    partial_total,
    tickets,  # [b, K]
    out_stride,
    qkv_stride,
    table_stride,
    splits,
    scale,  # of scores, times log2 e
    lora_scale,
    K: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    PAGE: tl.constexpr,
    RING: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,  # RANK rounded up to a power of two
    SPLIT: tl.constexpr,  # whether splits can be more than 1
    BLOCK: tl.constexpr,  # keys of a tile, divides PAGE
    FLIGHT: tl.constexpr,  # tiles asked for before the one at hand is needed
    EARLY: tl.constexpr,
    CHUNK: tl.constexpr,  # splits added up at once
    PDL: tl.constexpr,
    WIDE: tl.constexpr,  # bf16 by way of float32, for the interpreter
    ROWS: tl.constexpr = QUERY_ROWS,
):
    head, row = tl.program_id(0), tl.program_id(1)
    split = tl.program_id(2) if SPLIT else 0
    HALF: tl.constexpr = C // 2
    HEADS: tl.constexpr = K * G
    slot = tl.load(rows + row).to(tl.int64)
    position = tl.load(positions + slot)

    # Which tiles this split has. A ring's slot of the new token holds the key that just left the window.
    num_keys = tl.minimum(position, PAGE) if RING else position
    evicted = position % PAGE if RING else -1
    num_blocks = tl.cdiv(num_keys, BLOCK)
    per_split = tl.cdiv(num_blocks, splits) if SPLIT else num_blocks
    used_splits = tl.maximum(tl.cdiv(num_blocks, tl.maximum(per_split, 1)), 1)
    first = split * per_split
    last = tl.minimum(first + per_split, num_blocks)
    if split >= used_splits:
        return

    half = tl.arange(0, HALF)
    channel = tl.arange(0, C)
    group = tl.arange(0, ROWS)
    token = tl.arange(0, BLOCK)
    within = token[:, None] * C + channel[None, :]
    table = page_table + slot * table_stride
    rotation_cos = tl.load(cos + position.to(tl.int64) * HALF + half)
    rotation_sin = tl.load(sin + position.to(tl.int64) * HALF + half)

    page = slot
    if EARLY:
        if not RING:
            page = tl.load(table + first * BLOCK // PAGE, mask=first < last, other=0).to(tl.int64)
        tile = (page * K + head) * (PAGE * C) + (first * BLOCK) % PAGE * C
        early_at = first * BLOCK + token
        early_visible = (early_at < num_keys) & (early_at != evicted) & (first < last)
        early_key = tl.load(keys + tile + within, mask=early_visible[:, None], other=0.0)
        early_value = tl.load(values + tile + within, mask=early_visible[:, None], other=0.0)
        first += 1
    if PDL:  # everything above was written by kernels before the last one
        gdc_wait()
        gdc_launch_dependents()

    # The query, rotated: [ROWS, C], rows beyond G are zeros.
    own = qkv + row.to(tl.int64) * qkv_stride
    rank = tl.arange(0, RANKS)
    rank_mask = rank < RANK
    inner = rank.to(tl.float32)
    if RANK > 0:
        inner = tl.load(own + (HEADS + 2 * K) * C + rank, mask=rank_mask, other=0.0).to(tl.float32)
    low = (head * G + group[:, None]) * C + half[None, :]
    real = (group[:, None] < G) & (half[None, :] < HALF)
    q_low = _project(own, low, real, bias, lora_q, low, inner, lora_scale, BIAS, RANK, RANKS, WIDE)
    q_high = _project(own, low + HALF, real, bias, lora_q, low + HALF, inner, lora_scale, BIAS, RANK, RANKS, WIDE)
    dtype = keys.dtype.element_ty
    rotated_low = _narrow(q_low * rotation_cos[None, :] - q_high * rotation_sin[None, :], dtype, WIDE)
    rotated_high = _narrow(q_high * rotation_cos[None, :] + q_low * rotation_sin[None, :], dtype, WIDE)
    query = tl.reshape(tl.permute(tl.join(rotated_low, rotated_high), (0, 2, 1)), (ROWS, C))

    largest = tl.full((ROWS,), NOTHING, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, C), tl.float32)
    if split == 0:
        # The new token: stored for the steps to come, and taken from registers as the first key of this one.
        column, everywhere = HEADS * C + head * C + half, half < HALF
        if RANK > 0:
            inner = tl.load(own + (HEADS + 2 * K) * C + RANK + rank, mask=rank_mask, other=0.0).to(tl.float32)
        lora_row = head * C + half
        k_low = _project(own, column, everywhere, bias, lora_k, lora_row, inner, lora_scale, BIAS, RANK, RANKS, WIDE)
        k_high = _project(
            own, column + HALF, everywhere, bias, lora_k, lora_row + HALF, inner, lora_scale, BIAS, RANK, RANKS, WIDE
        )
        key_low = _narrow(k_low * rotation_cos - k_high * rotation_sin, dtype, WIDE)
        key_high = _narrow(k_high * rotation_cos + k_low * rotation_sin, dtype, WIDE)
        if RANK > 0:
            inner = tl.load(own + (HEADS + 2 * K) * C + 2 * RANK + rank, mask=rank_mask, other=0.0).to(tl.float32)
        column = (HEADS + K) * C + head * C + channel
        lora_row = head * C + channel
        new_value = _project(
            own, column, channel < C, bias, lora_v, lora_row, inner, lora_scale, BIAS, RANK, RANKS, WIDE
        ).to(dtype)
        new_page = slot
        if not RING:
            new_page = tl.load(table + position // PAGE).to(tl.int64)
        place = (new_page * K + head) * (PAGE * C) + position % PAGE * C
        tl.store(keys + place + half, key_low)
        tl.store(keys + place + HALF + half, key_high)
        tl.store(values + place + channel, new_value)
        largest = tl.sum(rotated_low.to(tl.float32) * key_low.to(tl.float32)[None, :], axis=1)
        largest += tl.sum(rotated_high.to(tl.float32) * key_high.to(tl.float32)[None, :], axis=1)
        largest *= scale
        total += 1.0
        sums += new_value.to(tl.float32)[None, :]

    if EARLY:
        largest, total, sums = _tile(query, early_key, early_value, early_visible, largest, total, sums, scale, WIDE)
    if not (RING and EARLY and BLOCK == PAGE):  # then the whole window was the first tile
        # A page's number is a load that another load waits for, and the pipeliner shares its stages between the two.
        STAGES: tl.constexpr = FLIGHT + 1 if RING else 2 * FLIGHT + 1
        for block in tl.range(first, last, num_stages=STAGES):
            page = slot
            if not RING:
                page = tl.load(table + block * BLOCK // PAGE).to(tl.int64)
            tile = (page * K + head) * (PAGE * C) + (block * BLOCK) % PAGE * C
            at = block * BLOCK + token
            visible = (at < num_keys) & (at != evicted)
            key = tl.load(keys + tile + within, mask=visible[:, None], other=0.0)
            value = tl.load(values + tile + within, mask=visible[:, None], other=0.0)
            largest, total, sums = _tile(query, key, value, visible, largest, total, sums, scale, WIDE)

    if SPLIT and used_splits > 1:
        mine = (row * splits + split) * K + head
        tl.store(partial_largest + mine * G + group, largest, mask=group < G)
        tl.store(partial_total + mine * G + group, total, mask=group < G)
        spot = mine * (G * C) + group[:, None] * C + channel[None, :]
        tl.store(partial_sums + spot, sums, mask=group[:, None] < G)
        tl.debug_barrier()  # every thread's part is written before one thread says so
        ticket = tl.atomic_add(tickets + row * K + head, 1, sem="acq_rel")
        if ticket == used_splits - 1:
            tl.store(tickets + row * K + head, 0)  # for the next launch
            largest = tl.full((ROWS,), NOTHING, tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            sums = tl.zeros((ROWS, C), tl.float32)
            for start in range(0, used_splits, CHUNK):
                part = start + tl.arange(0, CHUNK)
                there = (part[:, None] < used_splits) & (group[None, :] < G)
                stat = ((row * splits + part[:, None]) * K + head) * G + group[None, :]
                part_largest = tl.load(partial_largest + stat, mask=there, other=NOTHING, cache_modifier=".cg")
                part_total = tl.load(partial_total + stat, mask=there, other=0.0, cache_modifier=".cg")
                spots = stat[:, :, None] * C + channel[None, None, :]
                part_sums = tl.load(partial_sums + spots, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
                raised = tl.maximum(largest, tl.max(part_largest, axis=0))
                shrink = tl.exp2(largest - raised)
                share = tl.exp2(part_largest - raised[None, :])
                total = total * shrink + tl.sum(part_total * share, axis=0)
                sums = sums * shrink[:, None] + tl.sum(part_sums * share[:, :, None], axis=0)
                largest = raised
            _finish(out + row.to(tl.int64) * out_stride, sinks, head, largest, total, sums, G, C, ROWS, WIDE)
    else:
        _finish(out + row.to(tl.int64) * out_stride, sinks, head, largest, total, sums, G, C, ROWS, WIDE)


class Plan(NamedTuple):
    """How the work is cut; none of it changes the result but by the order of sums."""

    block: int = 64  # keys of a tile, a power of two of 16 or more
    warps: int = 4
    flight: int = 3  # tiles in flight
    early: bool = False  # the first tile is asked for before the query is known
    chunk: int = 8  # splits that the last program adds up at once
    registers: int | None = None  # at most so many a thread


def plan_for(num_rows: int, *, ring: bool) -> Plan:
    """The plan for a bucket of rows."""
    if ring:
        return Plan(block=128, flight=1)
    if num_rows <= 8:
        return Plan(block=128, flight=2)
    return Plan(block=64, flight=2)


def launch(
    out: "Tensor",
    qkv: "Tensor",
    *,
    sinks: "Tensor",
    cos: "Tensor",
    sin: "Tensor",
    keys: "Tensor",
    values: "Tensor",
    rows: "Tensor",
    positions: "Tensor",
    page_table: "Tensor | None",
    scale: float,
    bias: "Tensor | None",
    lora: "LoraB | None",
    splits: int,
    workspace: "Workspace | None",
    plan: Plan | None = None,
    launch_pdl: bool = False,
) -> None:
    """Starts the kernel on checked arguments (see `decode_attention`).

    launch_pdl: starts while the kernel before is still running, which must have been started after everything but `qkv`
    was written (programmatic dependent launch).
    """
    num_rows, (_, kv_heads, page, channels) = rows.shape[0], keys.shape
    plan = plan or plan_for(num_rows, ring=page_table is None)
    block = min(plan.block, page)
    rank = lora.q.shape[1] if lora else 0
    split = splits > 1
    unused = qkv  # stands where a pointer is not read
    interpreted = triton.knobs.runtime.interpret
    decode_kernel[(kv_heads, num_rows, splits)](
        out,
        qkv,
        unused if bias is None else bias,
        lora.q if lora else unused,
        lora.k if lora else unused,
        lora.v if lora else unused,
        cos,
        sin,
        sinks,
        keys,
        values,
        rows,
        positions,
        rows if page_table is None else page_table,
        workspace.sums if workspace and split else unused,
        workspace.largest if workspace and split else unused,
        workspace.total if workspace and split else unused,
        workspace.tickets if workspace and split else rows,
        out.stride(0),
        qkv.stride(0),
        0 if page_table is None else page_table.stride(0),
        splits,
        scale * LOG2_E.value,
        lora.scale if lora else 0.0,
        K=kv_heads,
        G=sinks.shape[0] // kv_heads,
        C=channels,
        PAGE=page,
        RING=page_table is None,
        BIAS=bias is not None,
        RANK=rank,
        RANKS=triton.next_power_of_2(max(rank, 1)),
        SPLIT=split,
        BLOCK=block,
        FLIGHT=plan.flight,
        EARLY=plan.early,
        CHUNK=plan.chunk,
        PDL=launch_pdl and not interpreted,
        WIDE=interpreted,
        num_warps=plan.warps,
        **({"launch_pdl": True} if launch_pdl and not interpreted else {}),
        **({"maxnreg": plan.registers} if plan.registers and not interpreted else {}),
    )
