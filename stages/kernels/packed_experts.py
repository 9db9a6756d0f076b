"""Mixture of experts straight from MXFP4 on a GPU: weights are unpacked in registers, while they are used.

`experts_decode` is for the few tokens of a decode step, all on the card and in a fixed order of sums; `experts_prefill`
for many, one expert's matrices dequantized at a time. Both take weights in the order of stages/model/mxfp4_layout.py.
Inference only. Shapes as in the package's docstring, A = N * k assignments of tokens to experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.kernels.launch import aligned_rows, asm, launch_options
from stages.kernels.routing import Routing

ROWS = 16  # of a tile of weights, the least a program works on


class Relaid(NamedTuple):
    """E matrices [M, K]: `words` int16 [E, M / 16, 4 K], `scales` int32 [E, M / 16, K / 8]."""

    words: Tensor
    scales: Tensor
    interleaved: bool  # whether rows alternate between gates and ups

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, M, K."""
        num_experts, tiles, words = self.words.shape
        return num_experts, tiles * ROWS, words // 4


class PackedLora(NamedTuple):
    """Factored deltas of E matrices in the compute dtype; the rows of b lie as the stored weights' do."""

    a: Tensor  # [E, R, K], R a multiple of 16
    b: Tensor  # [E, M, R]
    scale: float


class PackedExperts(NamedTuple):
    """One layer's experts. The biases float32 [E, M] and LoRA's b are in the order of the stored rows."""

    gate_up: Relaid
    down: Relaid
    gate_up_bias: Tensor
    down_bias: Tensor
    gate_up_lora: PackedLora | None
    down_lora: PackedLora | None
    alpha: float
    limit: float


class Launch(NamedTuple):
    """How a matrix is cut: `tiles` of 16 rows a program, and Triton's own numbers. None of it changes a bit."""

    tiles: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """The launches for steps of at most `rows` tokens."""

    rows: int
    tokens: int  # of one expert in a program
    few: int  # tiles of at most so many tokens are computed as narrower ones; 0: never
    gate_up: Launch
    down: Launch


# Measured on one H200 with gpt-oss-20b's shapes, see tests/bench/tune_experts.py.
PLANS = (
    Plan(4, 8, 0, Launch(4, 4, 3), Launch(4, 4, 3)),
    Plan(32, 8, 0, Launch(8, 4, 3), Launch(8, 4, 3)),
    Plan(96, 16, 8, Launch(4, 4, 3), Launch(4, 4, 3)),
    Plan(512, 32, 8, Launch(8, 4, 3), Launch(8, 4, 3)),
)
MAX_DECODE_ROWS = PLANS[-1].rows
LORA_PARTS = 5
# The inputs of down are summed in two halves in every plan: alone, one row's programs would not fill the card, and the
# same row must have the same bits in any company.
DOWN_PARTS = 2
AT_ONCE = 8  # experts dequantized together in a prefill: 0.27 GB of gate_up at gpt-oss-20b's size


def plan_for(num_rows: int) -> Plan:
    """The launches of a step of `num_rows` tokens. Raises ValueError beyond MAX_DECODE_ROWS."""
    for plan in PLANS:
        if num_rows <= plan.rows:
            return plan
    raise ValueError(f"a decode step has at most {MAX_DECODE_ROWS} tokens, got {num_rows}")


def experts_decode(hidden: Tensor, routing: Routing, experts: PackedExperts, *, plan: Plan | None = None) -> Tensor:
    """Each assignment's output float32 [parts, A, D], not weighted yet; the parts are to be summed.

    hidden [N, D]; routing: as `route` made it for this plan's tiles. The weighted sum is `combine_norm`'s.
    """
    plan = plan or plan_for(hidden.shape[0])
    return down(gate_up(hidden, routing, experts, plan), routing, experts, plan)


def gate_up(hidden: Tensor, routing: Routing, experts: PackedExperts, plan: Plan) -> Tensor:
    """The inner activations [A, F] of hidden [N, D], after SwiGLU."""
    from stages.kernels.triton_experts import gate_up_kernel

    weight, lora, launch = experts.gate_up, experts.gate_up_lora, plan.gate_up
    _, num_outputs, inputs = weight.shape
    assigned, top_k = routing.order.shape[0], routing.indices.shape[1]
    inner, factor, rank, scale = _lora(hidden, lora, routing, top_k=top_k, tokens=plan.tokens)
    out = hidden.new_empty(assigned, num_outputs // 2)
    tiles = _tiles(launch, num_outputs)
    gate_up_kernel[(routing.tiles.shape[0], -(-num_outputs // (ROWS * tiles)))](
        hidden, weight.words, weight.scales, experts.gate_up_bias, inner, factor, out, routing.order, routing.tiles,
        scale, experts.alpha, experts.limit, assigned * rank,
        K=inputs, M=num_outputs, TOPK=top_k, MT=tiles, BN=plan.tokens, FEW=plan.few, R=rank, PARTS=LORA_PARTS,
        ASM=asm(hidden), STAGES=launch.stages,
        **launch_options(hidden, warps=launch.warps),
    )  # fmt: skip
    return out


def down(activations: Tensor, routing: Routing, experts: PackedExperts, plan: Plan) -> Tensor:
    """The outputs float32 [parts, A, D] of activations [A, F]."""
    from stages.kernels.triton_experts import down_kernel

    weight, lora, launch = experts.down, experts.down_lora, plan.down
    _, num_outputs, inputs = weight.shape
    assigned = activations.shape[0]
    inner, factor, rank, scale = _lora(activations, lora, routing, top_k=1, tokens=plan.tokens)
    tiles = _tiles(launch, num_outputs)
    splits = min(DOWN_PARTS, max(1, inputs // 256))
    out = torch.empty(splits, assigned, num_outputs, dtype=torch.float32, device=activations.device)
    down_kernel[(routing.tiles.shape[0], -(-num_outputs // (ROWS * tiles)), splits)](
        activations, weight.words, weight.scales, experts.down_bias, inner, factor, out, routing.order, routing.tiles,
        scale, assigned * rank, assigned * num_outputs,
        K=inputs, M=num_outputs, SPLITS=splits, MT=tiles, BN=plan.tokens, FEW=plan.few, R=rank, PARTS=LORA_PARTS,
        ASM=asm(activations), STAGES=launch.stages,
        **launch_options(activations, warps=launch.warps),
    )  # fmt: skip
    return out


def experts_prefill(hidden: Tensor, indices: Tensor, weights: Tensor, experts: PackedExperts) -> Tensor:
    """The weighted sum float32 [N, D] of each token's chosen experts, for many tokens.

    hidden [N, D]; indices integer [N, k]; weights float32 [N, k]. Waits for the card once, to learn how many tokens
    chose which expert; AT_ONCE experts are dequantized at a time.
    """
    num_rows, top_k = indices.shape
    order = indices.flatten().argsort(stable=True)
    chosen = indices.flatten()[order]
    counts = torch.bincount(chosen, minlength=experts.gate_up.shape[0]).tolist()
    outputs = torch.empty(num_rows * top_k, experts.down.shape[1], dtype=hidden.dtype, device=hidden.device)
    start = 0
    for first in range(0, len(counts), AT_ONCE):
        here = slice(first, first + AT_ONCE)
        stop = start + sum(counts[here])
        assigned, owner = order[start:stop], chosen[start:stop]
        if start < stop:
            rows = hidden[assigned // top_k]
            inner = _project(rows, experts.gate_up, experts.gate_up_lora, here, counts[here])
            inner = _biased_swiglu(inner, experts, owner)
            out = _project(inner, experts.down, experts.down_lora, here, counts[here])
            outputs[assigned] = out.add_(experts.down_bias[owner].to(out.dtype))
        start = stop
    total = torch.zeros(num_rows, outputs.shape[1], dtype=torch.float32, device=hidden.device)
    for choice in range(top_k):
        total.addcmul_(outputs.view(num_rows, top_k, -1)[:, choice].float(), weights[:, choice, None].float())
    return total


def dequantize(
    relaid: Relaid, dtype: torch.dtype, *, experts: slice | None = None, stored_order: bool = False, room: int = 0
) -> Tensor:
    """The matrices [E, M, K + room], or those of some experts, in the checkpoint's order of rows unless stored_order.

    The last `room` columns are not written. Rows may lie further apart than they are long.
    """
    from stages.kernels.triton_experts import dequantize_kernel

    words, scales = relaid.words, relaid.scales
    if experts is not None:
        words, scales = words[experts], scales[experts]
    _, rows, inputs = relaid.shape
    like = torch.empty(0, dtype=dtype, device=words.device)
    out = aligned_rows(words.shape[0], rows, inputs + room, like=like)
    blocks = inputs // 256 + inputs % 256 // 64
    dequantize_kernel[(words.shape[0] * rows // ROWS * blocks,)](
        words, scales, out, out.stride(1), K=inputs, BLOCKS=blocks,
        INTERLEAVED=relaid.interleaved and not stored_order, ASM=asm(out), num_warps=1,
    )  # fmt: skip
    return out


def stored_rows(num_rows: int, *, interleaved: bool, device: torch.device | str = "cpu") -> Tensor:
    """int64 [M]: which row of the checkpoint each stored row is."""
    rows = torch.arange(num_rows, device=device).view(-1, ROWS)
    if interleaved:
        rows = rows.view(-1, ROWS // 2, 2).transpose(1, 2)
    return rows.reshape(num_rows)


def _project(rows: Tensor, weight: Relaid, lora: PackedLora | None, experts: slice, counts: list[int]) -> Tensor:
    """rows [n, K], counts[i] of them for each of some experts, through their matrices and LoRA: [n, M] as stored."""
    out = _grouped(rows, dequantize(weight, rows.dtype, experts=experts, stored_order=True), counts)
    if lora is not None:
        inner = _grouped(rows, lora.a[experts], counts)
        out = out.add_(_grouped(inner, lora.b[experts], counts), alpha=lora.scale)
    return out


def _grouped(rows: Tensor, matrices: Tensor, counts: list[int]) -> Tensor:
    """rows [n, K] times the transposes of matrices [G, M, K], counts[i] rows for the i-th: [n, M]."""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(rows.device, non_blocking=True)
        return F.grouped_mm(rows, matrices.mT, offs=ends)
    parts = rows.split(counts)
    return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, matrices, strict=True)])


def _biased_swiglu(inner: Tensor, experts: PackedExperts, owner: Tensor) -> Tensor:
    """SwiGLU [n, F] of inner [n, 2F] and its experts' biases, as stored; owner integer [n]."""
    from stages.kernels.triton_experts import swiglu_kernel

    num_rows, width = inner.shape
    out = inner.new_empty(num_rows, width // 2)
    swiglu_kernel[(num_rows, -(-width // 2048))](
        inner,
        experts.gate_up_bias,
        owner,
        out,
        width // 2,
        experts.alpha,
        experts.limit,
        M=width,
        BLOCK=1024,
        num_warps=4,
    )
    return out


class _Lora(NamedTuple):
    """What a kernel is given of an adapter; without one, any tensors and rank 0."""

    inner: Tensor  # A x float32 [LORA_PARTS, A, R], to be summed over the parts
    b: Tensor
    rank: int
    scale: float


def _lora(rows: Tensor, lora: PackedLora | None, routing: Routing, *, top_k: int, tokens: int) -> _Lora:
    """Computes LoRA's inner products of rows [A / top_k, K]."""
    from stages.kernels.triton_experts import lora_a_kernel

    if lora is None:
        return _Lora(rows, rows, 0, 0.0)
    _, rank, inputs = lora.a.shape
    assigned = routing.order.shape[0]
    inner = torch.empty(LORA_PARTS, assigned, rank, dtype=torch.float32, device=rows.device)
    lora_a_kernel[(routing.tiles.shape[0], LORA_PARTS)](
        rows, lora.a, inner, routing.order, routing.tiles, assigned * rank,
        K=inputs, TOPK=top_k, R=rank, BN=tokens, PARTS=LORA_PARTS,
        **launch_options(rows, warps=1 if tokens <= 16 else 4),
    )  # fmt: skip
    return _Lora(inner, lora.b, rank, lora.scale)


def _tiles(launch: Launch, num_rows: int) -> int:
    """Tiles of 16 rows a program: launch.tiles, or what a smaller matrix has."""
    return min(launch.tiles, 1 << ((num_rows // ROWS).bit_length() - 1))
