"""Triton kernels of the MXFP4 experts, on weights in the order of stages/model/mxfp4_layout.py.

Weights are the first operand of every product and tokens the second, so that a few tokens still fill a tensor core's
tile. A program takes MT x 16 rows of one expert's matrix and a tile of at most BN of the tokens that chose the expert
(stages/kernels/routing.py makes the tiles). Sums are float32.

ASM chooses how four weights are unpacked: by 2.5 instructions of inline PTX, or by plain operations that give the same
bits. Triton's interpreter runs the second.
"""

import triton
import triton.language as tl

from stages.kernels.triton_dot import dot

# One register holds two words, that is eight weights; results are four registers of two bfloat16 each. $4: words, $5,
# $7, $9, $11: the scales of the four places, twice in a register.
UNPACK: tl.constexpr = tl.constexpr("""
{
.reg .b32 first, second, a, b, c;
shl.b32 first, $4, 3;
shl.b32 second, $4, 6;
and.b32 a, $4, 0x81C081C0;
mul.rn.bf16x2 $0, a, $5;
and.b32 a, first, 0x81C081C0;
mul.rn.bf16x2 $1, a, $7;
and.b32 a, second, 0x81C081C0;
mul.rn.bf16x2 $2, a, $9;
shr.u32 a, $4, 5;
and.b32 a, a, 0x01000100;
shr.u32 b, $4, 4;
lop3.b32 a, b, 0x00C000C0, a, 0xEA;
shl.b32 c, $4, 1;
lop3.b32 a, c, 0x80008000, a, 0xEA;
mul.rn.bf16x2 $3, a, $11;
}
""")

# Four exponents in a register become four registers that hold a bfloat16 power of two twice.
SPLIT_SCALES: tl.constexpr = tl.constexpr("""
{
.reg .b32 even, odd;
shl.b32 even, $4, 7;
and.b32 even, even, 0x7F807F80;
shr.u32 odd, $4, 1;
and.b32 odd, odd, 0x7F807F80;
prmt.b32 $0, even, even, 0x1010;
prmt.b32 $1, odd, odd, 0x1010;
prmt.b32 $2, even, even, 0x3232;
prmt.b32 $3, odd, odd, 0x3232;
}
""")


@triton.jit
def _power(packed, place: tl.constexpr):
    """2^(s - 1) in float32 of the exponent byte at `place`."""
    return (((packed >> (8 * place)) & 0xFF) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _weight(bits, power):
    """The float32 of a sign and magnitude in a bfloat16's bits 15 and 8-6, times its power of two."""
    return (bits << 16).to(tl.float32, bitcast=True) * power


@triton.jit
def _spread(values, rows: tl.constexpr, halves: tl.constexpr, width: tl.constexpr):
    """[rows, halves] to [rows, width], each value over the places it belongs to."""
    wide = tl.broadcast_to(tl.reshape(values, [rows, halves, 1]), [rows, halves, width // halves])
    return tl.reshape(wide, [rows, width])


@triton.jit
def _unpack(words, packed, rows: tl.constexpr, halves: tl.constexpr, width: tl.constexpr, ASM: tl.constexpr):
    """Four tiles [rows, width]: the weights at the four places of words int16 [rows, width].

    packed: int32 [rows, halves], four exponents each.
    """
    if ASM:
        s0, s1, s2, s3 = tl.inline_asm_elementwise(
            SPLIT_SCALES,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        s0 = _spread(s0, rows, halves, width)
        s1 = _spread(s1, rows, halves, width)
        s2 = _spread(s2, rows, halves, width)
        s3 = _spread(s3, rows, halves, width)
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            UNPACK,
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
            [words, s0, s1, s2, s3],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        bits = words.to(tl.int32)
        w0 = _weight(bits & 0x81C0, _spread(_power(packed, 0), rows, halves, width))
        w1 = _weight((bits << 3) & 0x81C0, _spread(_power(packed, 1), rows, halves, width))
        w2 = _weight((bits << 6) & 0x81C0, _spread(_power(packed, 2), rows, halves, width))
        last = ((bits >> 5) & 0x0100) | ((bits >> 4) & 0x00C0) | ((bits << 1) & 0x8000)
        w3 = _weight(last, _spread(_power(packed, 3), rows, halves, width))
    return w0, w1, w2, w3


@triton.jit
def _load_256(words, scales, tile_words, tile_scales, MT: tl.constexpr, ASM: tl.constexpr):
    """The weights of MT row tiles and 256 inputs: four [MT * 16, 64], the inputs 64 apart."""
    tile = tl.arange(0, MT)
    group = tl.arange(0, 4)
    place = tl.arange(0, 256)
    raw = tl.load(words + tile[None, :, None] * tile_words + group[:, None, None] * 256 + place[None, None, :])
    raw = tl.permute(tl.reshape(raw, [4, MT, 8, 4, 2, 2, 2]), [1, 5, 2, 0, 4, 3, 6])
    packed = tl.load(scales + tile[:, None] * tile_scales + tl.arange(0, 32)[None, :])
    packed = tl.permute(tl.reshape(packed, [MT, 8, 2, 2]), [0, 3, 1, 2])
    return _unpack(tl.reshape(raw, [MT * 16, 64]), tl.reshape(packed, [MT * 16, 2]), MT * 16, 2, 64, ASM)


@triton.jit
def _load_64(words, scales, tile_words, tile_scales, MT: tl.constexpr, ASM: tl.constexpr):
    """The weights of MT row tiles and 64 inputs: four [MT * 16, 16], the inputs 16 apart."""
    tile = tl.arange(0, MT)
    raw = tl.load(words + tile[:, None] * tile_words + tl.arange(0, 256)[None, :])
    raw = tl.permute(tl.reshape(raw, [MT, 8, 4, 2, 2, 2]), [0, 4, 1, 3, 2, 5])
    # An int32 holds two exponents of one row and then two of the row eight below it.
    pairs = tl.load(scales + tile[:, None] * tile_scales + tl.arange(0, 8)[None, :])
    pairs = tl.permute(tl.join(pairs & 0xFFFF, (pairs >> 16) & 0xFFFF), [0, 2, 1])
    pairs = tl.reshape(pairs, [MT * 16, 1])
    packed = (pairs & 0xFF) * 0x0101 | ((pairs >> 8) * 0x0101) << 16
    return _unpack(tl.reshape(raw, [MT * 16, 16]), packed, MT * 16, 1, 16, ASM)


@triton.jit
def _dot(weight, x, acc):
    """acc + weight x, in the type of x."""
    return dot(weight.to(x.dtype), x, acc)


@triton.jit
def _product(
    acc, x, columns, words, scales, first, last, K: tl.constexpr, MT: tl.constexpr, ASM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """acc [MT * 16, BN] and what blocks first .. last of 256 inputs add to it.

    columns: offsets [BN] of the tokens in x; words and scales point to the first of the row tiles.
    """
    xs = x + columns[None, :] + tl.arange(0, 64)[:, None]
    for block in tl.range(first, last, num_stages=STAGES):
        w0, w1, w2, w3 = _load_256(words + block * 1024, scales + block * 32, 4 * K, K // 8, MT, ASM)
        acc = _dot(w0, tl.load(xs + block * 256), acc)
        acc = _dot(w1, tl.load(xs + block * 256 + 64), acc)
        acc = _dot(w2, tl.load(xs + block * 256 + 128), acc)
        acc = _dot(w3, tl.load(xs + block * 256 + 192), acc)
    return acc


@triton.jit
def _remainder(acc, x, columns, words, scales, K: tl.constexpr, MT: tl.constexpr, ASM: tl.constexpr):
    """acc [MT * 16, BN] and what the inputs add that fill no block of 256."""
    whole: tl.constexpr = K // 256
    xs = x + columns[None, :] + whole * 256 + tl.arange(0, 16)[:, None]
    words += whole * 1024
    scales += whole * 32
    for block in tl.range(0, K % 256 // 64, num_stages=1):
        w0, w1, w2, w3 = _load_64(words + block * 256, scales + block * 8, 4 * K, K // 8, MT, ASM)
        acc = _dot(w0, tl.load(xs + block * 64), acc)
        acc = _dot(w1, tl.load(xs + block * 64 + 16), acc)
        acc = _dot(w2, tl.load(xs + block * 64 + 32), acc)
        acc = _dot(w3, tl.load(xs + block * 64 + 48), acc)
    return acc


@triton.jit
def _lora(
    acc, inner, b, rows, assigned, inner_stride, scale, dtype: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr
):
    """acc + scale * B t: b [.., R] of the expert, at `rows`; inner float32 [PARTS, A, R] to be summed."""
    rank = tl.arange(0, R)
    t = tl.load(inner + assigned[None, :] * R + rank[:, None])
    for part in tl.static_range(1, PARTS):
        t += tl.load(inner + part * inner_stride + assigned[None, :] * R + rank[:, None])
    factor = tl.load(b + rows[:, None] * R + rank[None, :])
    return acc + _dot(factor, t.to(dtype), tl.zeros_like(acc)) * scale


@triton.jit
def _swiglu(gate, up, alpha, limit):
    gate = tl.minimum(gate, limit)
    up = tl.maximum(tl.minimum(up, limit), -limit)
    return (up + 1) * gate / (1 + tl.exp(-alpha * gate))


@triton.jit
def _gate_up_tile(
    x, words, scales, bias, inner, b, out, order, start, count, m, scale, alpha, limit, inner_stride,
    K: tl.constexpr, M: tl.constexpr, TOPK: tl.constexpr, MT: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
    PARTS: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, BN)
    assigned = tl.load(order + start + place, mask=place < count, other=0).to(tl.int64)
    columns = assigned // TOPK * K
    acc = tl.zeros([MT * 16, BN], tl.float32)
    acc = _product(acc, x, columns, words, scales, 0, K // 256, K, MT, ASM, STAGES)
    acc = _remainder(acc, x, columns, words, scales, K, MT, ASM)
    rows = m * 16 + tl.arange(0, MT * 16)
    acc += tl.load(bias + rows)[:, None]
    dtype: tl.constexpr = x.dtype.element_ty
    if R > 0:
        acc = _lora(acc, inner, b, rows, assigned, inner_stride, scale, dtype, R, PARTS)
    gate, up = tl.split(tl.permute(tl.reshape(acc, [MT, 2, 8, BN]), [0, 2, 3, 1]))
    activation = _swiglu(tl.reshape(gate, [MT * 8, BN]), tl.reshape(up, [MT * 8, BN]), alpha, limit)
    channels = m * 8 + tl.arange(0, MT * 8)
    where = out + assigned[None, :] * (M // 2) + channels[:, None]
    tl.store(where, activation.to(dtype), mask=(place < count)[None, :])


@triton.jit
def gate_up_kernel(
    x, words, scales, bias, inner, b, out, order, tiles, scale, alpha, limit, inner_stride,
    K: tl.constexpr, M: tl.constexpr, TOPK: tl.constexpr, MT: tl.constexpr, BN: tl.constexpr, FEW: tl.constexpr,
    R: tl.constexpr, PARTS: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The experts' inner activations [A, F] of A = N * TOPK assignments: bias, LoRA and SwiGLU done.

    Grid (tiles, M / 16 / MT); x [N, K]; words, scales: E matrices [M, K]; bias float32 [E, M] and b [E, M, R] in the
    order of the stored rows; tiles int32 [T, 3]: expert, first place in `order`, count. A tile of at most FEW tokens is
    computed as a narrower one.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tiles + tl.program_id(0) * 3
    # The last program's rows overlap the one's before it where MT does not divide them: both write the same.
    m = tl.minimum(tl.program_id(1) * MT, M // 16 - MT)
    count = tl.load(tile + 2)
    if count > 0:
        expert = tl.load(tile).to(tl.int64)
        start = tl.load(tile + 1)
        words += (expert * (M // 16) + m) * (4 * K)
        scales += (expert * (M // 16) + m) * (K // 8)
        bias += expert * M
        b += expert * M * R
        if FEW > 0 and count <= FEW:
            _gate_up_tile(
                x, words, scales, bias, inner, b, out, order, start, count, m, scale, alpha, limit, inner_stride,
                K, M, TOPK, MT, FEW, R, PARTS, ASM, STAGES,
            )  # fmt: skip
        else:
            _gate_up_tile(
                x, words, scales, bias, inner, b, out, order, start, count, m, scale, alpha, limit, inner_stride,
                K, M, TOPK, MT, BN, R, PARTS, ASM, STAGES,
            )  # fmt: skip


@triton.jit
def _down_tile(
    x, words, scales, bias, inner, b, out, order, start, count, m, scale, inner_stride, out_stride,
    K: tl.constexpr, M: tl.constexpr, SPLITS: tl.constexpr, MT: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
    PARTS: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, BN)
    assigned = tl.load(order + start + place, mask=place < count, other=0).to(tl.int64)
    rows = m * 16 + tl.arange(0, MT * 16)
    dtype: tl.constexpr = x.dtype.element_ty
    blocks: tl.constexpr = K // 256
    columns = assigned * K
    acc = tl.zeros([MT * 16, BN], tl.float32)
    if SPLITS == 1:
        acc = _product(acc, x, columns, words, scales, 0, blocks, K, MT, ASM, STAGES)
        acc = _remainder(acc, x, columns, words, scales, K, MT, ASM)
    else:
        # The last split is the shortest: it takes the remaining inputs, too.
        split = tl.program_id(2)
        each: tl.constexpr = (blocks + SPLITS - 1) // SPLITS
        last = tl.minimum(split * each + each, blocks)
        acc = _product(acc, x, columns, words, scales, split * each, last, K, MT, ASM, STAGES)
        if split == SPLITS - 1:
            acc = _remainder(acc, x, columns, words, scales, K, MT, ASM)
        out += split * out_stride
    if SPLITS == 1 or tl.program_id(2) == 0:
        acc += tl.load(bias + rows)[:, None]
        if R > 0:
            acc = _lora(acc, inner, b, rows, assigned, inner_stride, scale, dtype, R, PARTS)
    tl.store(out + assigned[None, :] * M + rows[:, None], acc, mask=(place < count)[None, :])


@triton.jit
def down_kernel(
    x, words, scales, bias, inner, b, out, order, tiles, scale, inner_stride, out_stride,
    K: tl.constexpr, M: tl.constexpr, SPLITS: tl.constexpr, MT: tl.constexpr, BN: tl.constexpr, FEW: tl.constexpr,
    R: tl.constexpr, PARTS: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The experts' outputs float32 [SPLITS, A, M], to be summed over the splits: bias and LoRA are in the first.

    Grid (tiles, M / 16 / MT, SPLITS); x [A, K] is what gate_up_kernel wrote; the rest as there.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tiles + tl.program_id(0) * 3
    # The last program's rows overlap the one's before it where MT does not divide them: both write the same.
    m = tl.minimum(tl.program_id(1) * MT, M // 16 - MT)
    count = tl.load(tile + 2)
    if count > 0:
        expert = tl.load(tile).to(tl.int64)
        start = tl.load(tile + 1)
        words += (expert * (M // 16) + m) * (4 * K)
        scales += (expert * (M // 16) + m) * (K // 8)
        bias += expert * M
        b += expert * M * R
        if FEW > 0 and count <= FEW:
            _down_tile(
                x, words, scales, bias, inner, b, out, order, start, count, m, scale, inner_stride, out_stride,
                K, M, SPLITS, MT, FEW, R, PARTS, ASM, STAGES,
            )  # fmt: skip
        else:
            _down_tile(
                x, words, scales, bias, inner, b, out, order, start, count, m, scale, inner_stride, out_stride,
                K, M, SPLITS, MT, BN, R, PARTS, ASM, STAGES,
            )  # fmt: skip


@triton.jit
def swiglu_kernel(inner, bias, owner, out, out_stride, alpha, limit, M: tl.constexpr, BLOCK: tl.constexpr):
    """SwiGLU [n, M / 2] of inner [n, M] + bias float32 [E, M][owner], rows as stored. Grid (n, M / 2 / BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < M // 2
    at = channel // 8 * 16 + channel % 8
    biases = bias + tl.load(owner + row) * M + at
    values = inner + row * M + at
    gate = tl.load(values, mask=inside, other=0.0).to(tl.float32) + tl.load(biases, mask=inside, other=0.0)
    up = tl.load(values + 8, mask=inside, other=0.0).to(tl.float32) + tl.load(biases + 8, mask=inside, other=0.0)
    activation = _swiglu(gate, up, alpha, limit)
    tl.store(out + row * out_stride + channel, activation.to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    inner, bias, owner, grad, grad_stride, more, routing, out, out_stride, grad_out, down_bias, grad_routing, alpha,
    limit, M: tl.constexpr, D: tl.constexpr, MORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a row: SwiGLU, the gradient of inner, in its place, and the gradient of the row's routing weight. Grid (n,).

    grad [n, M / 2], and more [n, M / 2] if MORE: of SwiGLU's output before it is weighted by routing float32 [n];
    grad_out [n, D]: of the experts' weighted sum; down_bias float32 [E, D].
    """
    row = tl.program_id(0).to(tl.int64)
    expert = tl.load(owner + row).to(tl.int64)
    weight = tl.load(routing + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, M // 2, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        inside = channel < M // 2
        at = channel // 8 * 16 + channel % 8
        values = inner + row * M + at
        biases = bias + expert * M + at
        gate = tl.load(values, mask=inside, other=0.0).to(tl.float32) + tl.load(biases, mask=inside, other=0.0)
        up = tl.load(values + 8, mask=inside, other=0.0).to(tl.float32) + tl.load(biases + 8, mask=inside, other=0.0)
        given = tl.load(grad + row * grad_stride + channel, mask=inside, other=0.0).to(tl.float32)
        if MORE:
            given += tl.load(more + row * (M // 2) + channel, mask=inside, other=0.0).to(tl.float32)
        clamped = tl.minimum(gate, limit)
        upper = tl.maximum(tl.minimum(up, limit), -limit) + 1.0
        share = 1.0 / (1.0 + tl.exp(-alpha * clamped))
        swish = clamped * share
        activation = upper * swish
        total += activation * given
        tl.store(out + row * out_stride + channel, activation.to(out.dtype.element_ty), mask=inside)
        given *= weight
        of_gate = given * upper * (share + alpha * swish * (1.0 - share))
        of_up = given * swish
        of_gate = tl.where(gate <= limit, of_gate, 0.0)
        of_up = tl.where((up <= limit) & (up >= -limit), of_up, 0.0)
        tl.store(values, of_gate.to(inner.dtype.element_ty), mask=inside)
        tl.store(values + 8, of_up.to(inner.dtype.element_ty), mask=inside)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        of_sum = tl.load(grad_out + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        total += of_sum * tl.load(down_bias + expert * D + d, mask=d < D, other=0.0)
    tl.store(grad_routing + row, tl.sum(total, axis=0))


@triton.jit
def gather_kernel(x, assigned, out, out_stride, TOPK: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """out [n, K], rows out_stride apart, = x [N, K][assigned int64 [n] // TOPK]. Grid (n,)."""
    row = tl.program_id(0).to(tl.int64)
    source = x + tl.load(assigned + row) // TOPK * K
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        tl.store(out + row * out_stride + k, tl.load(source + k, mask=k < K, other=0.0), mask=k < K)


@triton.jit
def combine_kernel(
    outputs, places, indices, routing, bias, out, D: tl.constexpr, TOPK: tl.constexpr, BLOCK: tl.constexpr
):
    """out float32 [N, D] = sum over a token's choices of routing * (outputs[places] + bias), in their order.

    outputs [N * TOPK, D]; places, indices int64, routing float32 [N, TOPK]; bias float32 [E, D]. Grid (N, D / BLOCK).
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOPK):
        at = row * TOPK + choice
        value = tl.load(outputs + tl.load(places + at) * D + d, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(bias + tl.load(indices + at) * D + d, mask=inside, other=0.0)
        total += value * tl.load(routing + at)
    tl.store(out + row * D + d, total, mask=inside)


@triton.jit
def sum_kernel(
    rows, row_stride, more, places, out, D: tl.constexpr, TOPK: tl.constexpr, MORE: tl.constexpr, BLOCK: tl.constexpr
):
    """out [N, D] = sum over a token's choices of (rows + more)[places], in their order; more [N * TOPK, D] if MORE.

    Grid (N, D / BLOCK).
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOPK):
        place = tl.load(places + row * TOPK + choice)
        total += tl.load(rows + place * row_stride + d, mask=inside, other=0.0).to(tl.float32)
        if MORE:
            total += tl.load(more + place * D + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + d, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def lora_a_kernel(
    x, a, out, order, tiles, out_stride,
    K: tl.constexpr, TOPK: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A x of each assignment's expert, float32 [PARTS, A, R] to be summed over the parts.

    Grid (tiles, PARTS); a [E, R, K]; x [A / TOPK, K].
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tiles + tl.program_id(0) * 3
    part = tl.program_id(1)
    count = tl.load(tile + 2)
    if count > 0:
        expert = tl.load(tile).to(tl.int64)
        place = tl.arange(0, BN)
        assigned = tl.load(order + tl.load(tile + 1) + place, mask=place < count, other=0).to(tl.int64)
        rank = tl.arange(0, R)
        k = tl.arange(0, 64)
        each: tl.constexpr = (K // 64 + PARTS - 1) // PARTS
        acc = tl.zeros([R, BN], tl.float32)
        xs = x + assigned[None, :] // TOPK * K + k[:, None]
        factor = a + expert * R * K + rank[:, None] * K + k[None, :]
        for block in tl.range(part * each, tl.minimum(part * each + each, K // 64), num_stages=4):
            acc = _dot(tl.load(factor + block * 64), tl.load(xs + block * 64), acc)
        where = out + part * out_stride + assigned[None, :] * R + rank[:, None]
        tl.store(where, acc, mask=(place < count)[None, :])


@triton.jit
def _store_four(where, w0, w1, w2, w3, width: tl.constexpr):
    """Stores four tiles [16, width] side by side; where [16, 1] points to the rows' first."""
    where = where + tl.arange(0, width)[None, :]
    dtype: tl.constexpr = where.dtype.element_ty
    tl.store(where, w0.to(dtype))
    tl.store(where + width, w1.to(dtype))
    tl.store(where + 2 * width, w2.to(dtype))
    tl.store(where + 3 * width, w3.to(dtype))


@triton.jit
def dequantize_kernel(
    words, scales, out, row_stride, K: tl.constexpr, BLOCKS: tl.constexpr, INTERLEAVED: tl.constexpr, ASM: tl.constexpr
):
    """The matrices [E, M, K] themselves, in the checkpoint's order of rows. Grid: E * M / 16 tiles of rows times the
    BLOCKS of a row, which are neighbours: rows are written whole.
    """
    whole: tl.constexpr = K // 256
    tile = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    stored = tl.arange(0, 16)
    row = stored % 8 * 2 + stored // 8 if INTERLEAVED else stored
    where = out + (tile * 16 + row[:, None]) * row_stride
    if block < whole:
        w0, w1, w2, w3 = _load_256(
            words + tile * 4 * K + block * 1024, scales + tile * (K // 8) + block * 32, 0, 0, 1, ASM
        )
        _store_four(where + block * 256, w0, w1, w2, w3, 64)
    else:
        rest = block - whole
        t0, t1, t2, t3 = _load_64(
            words + tile * 4 * K + whole * 1024 + rest * 256,
            scales + tile * (K // 8) + whole * 32 + rest * 8,
            0,
            0,
            1,
            ASM,
        )
        _store_four(where + whole * 256 + rest * 64, t0, t1, t2, t3, 16)
