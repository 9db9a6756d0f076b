"""Attention of a decode step: one new token for each row, over the paged cache or a ring of the window, with sinks.

What a GEMM leaves to do between the projections and the attention is done here: bias, LoRA's second factor, RoPE, and
storing the new key and value. Nothing waits for the host and nothing is allocated but `out`, so that a CUDA graph can
hold it; how far the cache is read follows from `positions` when the graph is replayed.

Paths: the Triton kernel on a GPU (and in Triton's interpreter), the plain oracle on a CPU without it. No gradients.
Shapes: b rows of the step, H query heads, K key/value heads, C channels, r LoRA rank (0: none), P pages of a slot.
"""

import importlib.util
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stages.kernels import reference

MULTIPROCESSORS = 132  # of an H100 or H200; other cards want another number of programs, none a very different one
MAX_GROUP = 16  # query heads of a KV head that one program takes


class LoraB(NamedTuple):
    """LoRA's second factors of the three projections; the first ones are rows of the GEMM's own weight."""

    q: Tensor  # [H * C, r]
    k: Tensor  # [K * C, r]
    v: Tensor  # [K * C, r]
    scale: float


class Workspace(NamedTuple):
    """What splits leave for the last of them to add up, float32; `tickets` int32 are 0 between launches."""

    sums: Tensor  # [pairs * H * C], a pair being a row and a split
    largest: Tensor  # [pairs * H]
    total: Tensor  # [pairs * H]
    tickets: Tensor  # [max_rows * H]


def make_workspace(max_rows: int, heads: int, channels: int, max_splits: int, device: torch.device | str) -> Workspace:
    """Memory for every launch whose rows * splits is at most max(max_rows, max_splits, 128); one launch at a time."""
    pairs = max(max_rows, max_splits, 128)
    sums, largest, total = (
        torch.empty(pairs * size, dtype=torch.float32, device=device) for size in (heads * channels, heads, heads)
    )
    return Workspace(sums, largest, total, torch.zeros(max_rows * heads, dtype=torch.int32, device=device))


def splits_for(num_rows: int, max_context: int, *, kv_heads: int = 8, multiprocessors: int = MULTIPROCESSORS) -> int:
    """Into how many pieces a full layer's keys are cut so that a small batch fills the card: two programs a processor,
    and no piece of fewer than 64 keys. Large batches are not cut (a window of 128 never is).
    """
    wanted = multiprocessors // (kv_heads * num_rows)
    return max(1, min(wanted, -(-max_context // 64)))


def decode_attention(
    qkv: Tensor,
    *,
    sinks: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    positions: Tensor,
    page_table: Tensor | None,
    scale: float,
    bias: Tensor | None = None,
    lora: LoraB | None = None,
    splits: int = 1,
    workspace: Workspace | None = None,
    out: Tensor | None = None,
    launch_pdl: bool = False,
    path: Literal["auto", "triton", "plain"] = "auto",
) -> Tensor:
    """The attention output [b, H * C] of each row's new token, whose key and value are added to the cache.

    qkv [b, (H + 2 K) * C + 3 r]: the projections without bias, then LoRA's inner products of q, k and v, unscaled; in
    the type of the cache, or float32, which is rounded to it once, after RoPE.
    sinks [H]; cos, sin float32 [max_positions, C / 2] with YaRN's attention scaling in them; bias [(H + 2 K) * C].
    rows int32 [b]: the slot of each row (a dummy slot may come more than once). positions int32 [slots]: how many
    tokens a slot has cached, which is the new token's position.
    page_table int32 [slots, P] and keys, values [pages, K, page, C]: tokens i * page ... of a slot are in page
    page_table[slot, i]; all 0 ... position are visible. page_table None and keys, values [slots, K, W, C]: token p lies
    at p % W, and the last W are visible, the new one among them. Keys carry RoPE.
    splits: pieces of each row's keys, which other programs take (`splits_for`); above 1 needs a `workspace`.
    launch_pdl: programmatic dependent launch; everything but qkv must have been written before the previous kernel
    began. Raises ValueError on what does not fit; what positions and page_table hold is the caller's word.
    """
    heads, kv_heads, page, channels = sinks.shape[0], *keys.shape[1:]
    rank = lora.q.shape[1] if lora else 0
    num_rows, width = rows.shape[0], (heads + 2 * kv_heads) * channels + 3 * rank
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "qkv": (qkv, (num_rows, width)),
        "values": (values, tuple(keys.shape)),
        "sin": (sin, tuple(cos.shape)),
        "cos": (cos, (cos.shape[0], channels // 2)),
        "bias": (bias, ((heads + 2 * kv_heads) * channels,)),
        "lora.q": (lora.q if lora else None, (heads * channels, rank)),
        "lora.k": (lora.k if lora else None, (kv_heads * channels, rank)),
        "lora.v": (lora.v if lora else None, (kv_heads * channels, rank)),
        "out": (out, (num_rows, heads * channels)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {shape}")
        if not (tensor.stride(-1) == 1 if name in ("qkv", "out") else tensor.is_contiguous()):
            raise ValueError(f"{name} is not contiguous")
    if heads % kv_heads or heads // kv_heads > MAX_GROUP:
        raise ValueError(f"{heads} query heads on {kv_heads} KV heads: each may serve 1 to {MAX_GROUP}")
    if keys.dtype != values.dtype or qkv.dtype not in (keys.dtype, torch.float32):
        raise ValueError(
            f"keys and values are {keys.dtype} and {values.dtype}: they must be equal; qkv, here {qkv.dtype}, may be "
            "float32 besides"
        )
    for name, tensor in (("rows", rows), ("positions", positions), ("page_table", page_table)):
        if tensor is not None and (tensor.dtype != torch.int32 or tensor.stride(-1) != 1):
            raise ValueError(f"{name} must be contiguous int32, is {tensor.dtype}")
    if splits < 1 or (page_table is None and splits > 1):
        raise ValueError(f"splits is {splits}; at least 1, and a ring is never split")
    if splits > 1:
        if workspace is None:
            raise ValueError("more than one split needs a workspace: make_workspace(...)")
        if num_rows * splits * heads > workspace.total.numel() or num_rows * kv_heads > workspace.tickets.numel():
            room = workspace.total.numel() // heads
            raise ValueError(f"{num_rows} rows of {splits} splits; the workspace holds {room}: see make_workspace")
    shared: dict[str, Any] = {
        "sinks": sinks, "cos": cos, "sin": sin, "keys": keys, "values": values, "rows": rows, "positions": positions,
        "page_table": page_table, "scale": scale, "bias": bias, "lora": lora,
    }  # fmt: skip
    if path == "auto":
        path = "triton" if qkv.is_cuda or interpreted() else "plain"
    if path == "plain":
        result = reference.decode_attention(qkv, **shared)
        return result if out is None else out.copy_(result)
    for name, size in (("channels", channels), ("the cache's pages", page)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name} are {size}: the kernel takes powers of two from 16")
    from stages.kernels.decode_attention_triton import launch

    if out is None:
        out = torch.empty((num_rows, heads * channels), dtype=keys.dtype, device=qkv.device)
    launch(out, qkv, **shared, splits=splits, workspace=workspace, launch_pdl=launch_pdl)
    return out


def interpreted() -> bool:
    """Whether Triton is there and runs its kernels in its interpreter (TRITON_INTERPRET=1), on any device."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)
