"""The model's mathematics for the GPU engine: a decode step that a CUDA graph can hold, and the prefill of prompts.

A step reads the policy's own weights. The projections of q, k and v become views of one matrix, so that one product
serves; LoRA's first factors are further rows of it. The adapter is copied in, in the compute dtype, by `attach`, always
to the same addresses, so that graphs captured before an update sample from the policy after it; the experts' part of
the copy, nearly as large as the adapter, lies where the cache does and goes with it. The residual stream, the router's
logits and what the projections give are float32. Every sum has one order, whatever rows are computed together: a row's
bits do not depend on its company. Experts that are not MXFP4 in the kernels' order are computed on every row by every
expert (slower, in any dtype).

Shapes: b rows of a step, T tokens of a prefill, D hidden, H query heads, K key/value heads, C channels, r LoRA rank,
V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stages.engine.cache import LayerCache
from stages.engine.device_memory import CacheMemory
from stages.kernels.decode_attention import LoraB, decode_attention, make_workspace, max_split_rows, splits_for
from stages.kernels.launch import on_hopper
from stages.kernels.linear import linear, linear_parts
from stages.kernels.norms import add_norm, combine_norm, embed_norm
from stages.kernels.packed_experts import (
    MAX_DECODE_ROWS,
    PackedExperts,
    PackedLora,
    experts_decode,
    experts_prefill,
    plan_for,
    stored_rows,
)
from stages.kernels.prefill_attention import PackedDocs, prefill_attention
from stages.kernels.routing import route, router_logits
from stages.model.experts import Experts, PackedWeight
from stages.model.nf4 import unembed
from stages.model.policy import Policy

RANK_TILE = 16  # the experts' LoRA rank is padded with zeros to a multiple of this
O_PARTS = 2  # of its inputs, in every step and prefill: whole, its few outputs would not fill the card for one row
PDL_ROWS = 16  # up to here attention gains when it begins before the projection has ended; beyond it loses
SPLIT_CONTEXT = 8192  # contexts for which a small batch's attention is cut in as many pieces as pay


class Step:
    """One policy's decode and prefill.

    Example:
        step = Step(policy, max_rows=64, max_context=4096)
        step.attach(memory)
        logits = step.embed_and_decode(rows, tokens, positions, page_table, cache.layers)
    """

    def __init__(self, policy: Policy, max_rows: int, max_context: int) -> None:
        """Raises ValueError when a step of max_rows is more than the kernels take."""
        if max_rows > MAX_DECODE_ROWS:
            raise ValueError(f"max_slots is {max_rows}, the GPU engine decodes at most {MAX_DECODE_ROWS} at a time")
        self.policy, self.config = policy, policy.model.config
        decoder = policy.model.model
        self.eps = float(self.config.rms_norm_eps)
        self.top_k = int(self.config.num_experts_per_tok)
        self.embedding = policy.embedding()
        self.layers = [_Layer(layer, self.config, policy.dtype) for layer in decoder.layers]
        self.norms = [layer.input_layernorm.weight for layer in decoder.layers] + [decoder.norm.weight]
        at = torch.arange(max_context, device=policy.device)
        self.cos, self.sin = (
            table[0].contiguous() for table in decoder.rotary_emb(torch.empty(1, device=policy.device), at[None])
        )
        heads, channels = self.config.num_attention_heads, self.config.head_dim
        self.max_context = max_context
        split_rows = min(max_rows, max_split_rows(kv_heads=self.config.num_key_value_heads))
        self.workspace = make_workspace(split_rows, heads, channels, max_context, policy.device)
        # A list takes each layer's choices int [b, k] or [T, k]; of a captured step, where every replay puts them.
        self.routes: list[Tensor] | None = None

    def attach(self, memory: CacheMemory) -> None:
        """Makes ready for a run: takes memory for a copy of the adapter, and copies it as it is now."""
        sizes = [layer.expert_lora_numel for layer in self.layers]
        if sum(sizes):
            flat = memory.zeros("adapter", (sum(sizes),), self.policy.dtype)
            for layer, part in zip(self.layers, flat.split(sizes), strict=True):
                layer.place_expert_lora(part)
        self.refresh()

    def detach(self) -> None:
        """Forgets the memory that `attach` took, which is about to go back."""
        for layer in self.layers:
            layer.place_expert_lora(None)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the adapter as it is now to where the step and its graphs read it."""
        for layer in self.layers:
            layer.refresh()

    @torch.no_grad()
    def embed_and_decode(
        self, rows: Tensor, tokens: Tensor, positions: Tensor, page_table: Tensor, layers: Sequence[LayerCache]
    ) -> Tensor:
        """Logits float32 [b, V] of what follows each row's token, whose key and value are in the cache then.

        rows int32 [b]: slots; tokens int64, positions int32 [slots]; page_table int32 [slots, P]. Does not wait for the
        card, nor does anything in it depend on what the tensors hold: a CUDA graph can hold it.
        """
        num_rows = rows.shape[0]
        residual = torch.empty(num_rows, self.config.hidden_size, dtype=torch.float32, device=rows.device)
        normed = embed_norm(
            self.embedding, tokens, rows, residual, self.norms[0], dtype=self.policy.dtype, eps=self.eps
        )
        splits = splits_for(num_rows, min(self.max_context, SPLIT_CONTEXT), kv_heads=self.config.num_key_value_heads)
        for index, (layer, cache) in enumerate(zip(self.layers, layers, strict=True)):
            attended = decode_attention(
                layer.qkv(normed),
                sinks=layer.sinks,
                cos=self.cos,
                sin=self.sin,
                keys=cache.keys,
                values=cache.values,
                rows=rows,
                positions=positions,
                page_table=page_table if layer.window is None else None,
                scale=layer.scale,
                bias=layer.qkv_bias,
                lora=layer.qkv_lora,
                splits=splits if layer.window is None else 1,
                workspace=self.workspace,
                launch_pdl=num_rows <= PDL_ROWS and on_hopper(normed),
            )
            normed = self._add_norm(layer, residual, layer.o(attended))
            normed = self._experts_and_norm(layer, normed, residual, self.norms[index + 1])
        return unembed(self.policy.model.lm_head, normed)

    @torch.no_grad()
    def prefill(
        self,
        ids: Tensor,
        starts: Sequence[int],
        past: int,
        past_kv: Callable[[int], tuple[Tensor, Tensor]] | None,
        write_kv: Callable[[int, Tensor, Tensor], None],
    ) -> Tensor:
        """Logits float32 [prompts, V] of what follows each of the packed prompts.

        ids int64 [T], the prompts one after the other, beginning at `starts`; past: tokens of the one prompt that came
        before, whose keys and values [L, K, C] past_kv(layer) returns. write_kv(layer, keys, values) is given each
        layer's [T, K, C].
        """
        ends = [*starts[1:], ids.shape[0]]
        lengths = tuple(end - start for start, end in zip(starts, ends, strict=True))
        offsets = torch.tensor(starts, device=ids.device).repeat_interleave(torch.tensor(lengths, device=ids.device))
        at = torch.arange(ids.shape[0], device=ids.device) - offsets + past
        cos, sin = self.cos[at][:, None], self.sin[at][:, None]
        residual = self.policy.embed(ids).float()
        normed = self._norm(residual, self.norms[0])
        for index, layer in enumerate(self.layers):
            query, key, value = layer.heads(layer.qkv(normed), cos, sin)
            keys, values, seen = key, value, 0
            if past_kv is not None:
                old_keys, old_values = past_kv(index)
                keys, values = torch.cat((old_keys, key)), torch.cat((old_values, value))
                seen = old_keys.shape[0]
            docs = PackedDocs(lengths, past=seen)
            attended = prefill_attention(
                query, keys, values, sinks=layer.sinks, scale=layer.scale, window=layer.window, docs=docs
            )
            write_kv(index, key, value)
            normed = self._add_norm(layer, residual, layer.o(attended.flatten(1)))
            residual += layer.experts_prefill(normed, self.top_k, self.routes)
            normed = self._norm(residual, self.norms[index + 1])
        last = normed[torch.tensor(ends, device=ids.device) - 1]
        return unembed(self.policy.model.lm_head, last)

    def _norm(self, stream: Tensor, weight: Tensor) -> Tensor:
        scaled = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + self.eps)
        return (weight * scaled).to(self.policy.dtype)

    def _add_norm(self, layer: "_Layer", residual: Tensor, projected: Tensor) -> Tensor:
        return add_norm(
            residual,
            projected,
            layer.o_bias,
            layer.o_lora,
            layer.norm,
            dtype=self.policy.dtype,
            scale=layer.lora_scale,
            eps=self.eps,
        )

    def _experts_and_norm(self, layer: "_Layer", normed: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        if layer.packed is None:
            _, weights, indices = layer.router(normed)
            if self.routes is not None:
                self.routes.append(indices)
            residual += layer.experts.every_row(normed, indices, weights)
            return self._norm(residual, weight)
        logits = router_logits(normed, layer.router.weight, layer.router.bias)
        plan = plan_for(normed.shape[0])
        routing = route(logits, top_k=self.top_k, tile=plan.tokens)
        if self.routes is not None:
            self.routes.append(routing.indices)
        partials = experts_decode(normed, routing, layer.packed, plan=plan)
        return combine_norm(residual, partials, routing.weights, weight, dtype=normed.dtype, eps=self.eps)


class _Layer:
    """One layer's weights as the step reads them."""

    def __init__(self, layer: Any, config: Any, dtype: torch.dtype) -> None:
        attention = layer.self_attn
        self.dtype = dtype
        self.window: int | None = attention.sliding_window
        self.scale = float(attention.scaling)
        self.sinks, self.norm = attention.sinks, layer.post_attention_layernorm.weight
        self.router, self.experts = layer.mlp.router, layer.mlp.experts
        self.channels = config.head_dim
        self.sizes = tuple(
            count * self.channels
            for count in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        )
        self._qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        self._o = attention.o_proj
        self.rank = self._o.a.shape[0] if hasattr(self._o, "a") else 0
        self.lora_scale = float(self._o.scale) if self.rank else 0.0
        # NF4 layers unpack themselves: they are called as they are, and add their biases.
        self.whole = _base(self._o).weight.dtype.is_floating_point
        self.qkv_bias = torch.cat([_base(module).bias for module in self._qkv]).to(dtype) if self.whole else None
        self.o_bias = _base(self._o).bias if self.whole else torch.zeros_like(_base(self._o).bias)
        self.qkv_weight = _fused(self._qkv, self.rank) if self.whole else _first_factors(self._qkv, self.rank, dtype)
        self.o_weight = _fused([self._o], self.rank) if self.whole else _first_factors([self._o], self.rank, dtype)
        self._factors: list[Tensor] = []
        self.qkv_lora: LoraB | None = None
        self.o_lora: Tensor | None = None
        if self.rank:
            self._factors = [torch.empty_like(module.b, dtype=dtype) for module in self._qkv]
            q, k, v = self._factors
            self.qkv_lora = LoraB(q=q, k=k, v=v, scale=self.lora_scale)
            self.o_lora = torch.empty_like(self._o.b, dtype=dtype)
        self.packed = packed_experts(self.experts)
        self._expert_lora = _expert_lora_shapes(self.experts) if self.packed is not None else []

    @property
    def expert_lora_numel(self) -> int:
        """Numbers in the copy of the experts' adapter."""
        return sum(math.prod(shape) for shape in self._expert_lora)

    def place_expert_lora(self, flat: Tensor | None) -> None:
        """Has that copy lie in `flat` [expert_lora_numel], which is all zero; None: nowhere."""
        if not self._expert_lora:
            return
        assert self.packed is not None
        loras: list[PackedLora | None] = [None, None]
        if flat is not None:
            parts = flat.split([math.prod(shape) for shape in self._expert_lora])
            a1, b1, a2, b2 = (part.view(shape) for part, shape in zip(parts, self._expert_lora, strict=True))
            loras = [
                PackedLora(a1, b1, float(self.experts.gate_up_lora.scale)),
                PackedLora(a2, b2, float(self.experts.down_lora.scale)),
            ]
        self.packed = self.packed._replace(gate_up_lora=loras[0], down_lora=loras[1])

    def refresh(self) -> None:
        """Copies the adapter; while it is disabled, zeros for its second factors."""
        if not self.rank:
            return
        on = 1.0 if self._o.adapter_enabled else 0.0
        assert self.o_lora is not None
        for index, module in enumerate(self._qkv):
            start = self.qkv_weight.shape[0] - (len(self._qkv) - index) * self.rank
            self.qkv_weight[start : start + self.rank] = module.a
            self._factors[index].copy_(module.b * on)
        self.o_weight[-self.rank :] = self._o.a
        self.o_lora.copy_(self._o.b * on)
        if self.packed is not None:
            for adapter, own in (
                (self.packed.gate_up_lora, self.experts.gate_up_lora),
                (self.packed.down_lora, self.experts.down_lora),
            ):
                if adapter is None:
                    continue
                rank = own.a.shape[1]
                adapter.a[:, :rank] = own.a
                rows = stored_rows(own.b.shape[1], interleaved=own is self.experts.gate_up_lora, device=own.b.device)
                adapter.b[..., :rank] = own.b[:, rows] * on

    def qkv(self, normed: Tensor) -> Tensor:
        """float32 [N, (H + 2K) C + 3r]: the projections without bias, and LoRA's inner products."""
        if self.whole:
            return linear(normed, self.qkv_weight, dtype=torch.float32)
        return self._unpacked(self._qkv, normed, self.qkv_weight)

    def o(self, attended: Tensor) -> Tensor:
        """float32 [O_PARTS, N, D + r], likewise, to be summed."""
        if self.whole:
            return linear_parts(attended, self.o_weight, parts=O_PARTS)
        return self._unpacked([self._o], attended, self.o_weight)[None]

    @staticmethod
    def _unpacked(modules: Sequence[Any], rows: Tensor, first_factors: Tensor) -> Tensor:
        """What `qkv` and `o` return, of NF4 layers, biases included."""
        return torch.cat([*(_base(module)(rows) for module in modules), rows @ first_factors.mT], dim=1).float()

    def heads(self, projected: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [T, H, C], key and value [T, K, C] with bias, LoRA and RoPE, of what `qkv` returned."""
        total = sum(self.sizes)
        plain = projected[:, :total].clone() if self.qkv_bias is None else projected[:, :total] + self.qkv_bias
        if self.qkv_lora is not None:
            inner = projected[:, total:].unflatten(1, (3, self.rank))
            deltas = [inner[:, index] @ self._factors[index].float().mT for index in range(3)]
            plain = plain.add_(torch.cat(deltas, dim=1), alpha=self.lora_scale)
        query, key, value = (part.unflatten(1, (-1, self.channels)) for part in plain.split(self.sizes, dim=1))
        dtype = self.dtype
        return _rotated(query, cos, sin).to(dtype), _rotated(key, cos, sin).to(dtype), value.to(dtype).contiguous()

    def experts_prefill(self, normed: Tensor, top_k: int, routes: list[Tensor] | None) -> Tensor:
        """The experts' weighted sum float32 [T, D]; routes, where it is a list, takes their choice."""
        if self.packed is None:
            _, weights, indices = self.router(normed)
        else:
            logits = router_logits(normed, self.router.weight, self.router.bias)
            values, order = logits.sort(dim=-1, descending=True, stable=True)
            weights, indices = values[:, :top_k].softmax(-1), order[:, :top_k]
        if routes is not None:
            routes.append(indices.to(torch.uint8))  # a copy: `order` is eight bytes for every expert
        if self.packed is None:
            return self.experts(normed, indices, weights).float()
        return experts_prefill(normed, indices, weights, self.packed)


def packed_experts(experts: Experts) -> PackedExperts | None:
    """A layer's experts as the kernels take them, without its adapter; None if they are not MXFP4 or do not fit the
    kernels' order.
    """
    gate_up, down = experts.gate_up, experts.down
    if not isinstance(gate_up, PackedWeight) or not isinstance(down, PackedWeight):
        return None
    relaid = gate_up.relaid(), down.relaid()
    if relaid[0] is None or relaid[1] is None:
        return None
    rows = stored_rows(gate_up.out_features, interleaved=True, device=gate_up.bias.device)
    return PackedExperts(
        gate_up=relaid[0],
        down=relaid[1],
        gate_up_bias=gate_up.bias[:, rows].float().contiguous(),
        down_bias=down.bias.float().contiguous(),
        gate_up_lora=None,
        down_lora=None,
        alpha=experts.alpha,
        limit=experts.limit,
    )


def _expert_lora_shapes(experts: Experts) -> list[tuple[int, ...]]:
    """Of the factors A and B of gate_up and of down, in the kernels' order; none without an adapter there."""
    if experts.gate_up_lora is None or experts.down_lora is None:
        return []
    shapes: list[tuple[int, ...]] = []
    for lora in (experts.gate_up_lora, experts.down_lora):
        num_experts, rank, inputs = lora.a.shape
        padded = -(-rank // RANK_TILE) * RANK_TILE
        shapes += [(num_experts, padded, inputs), (num_experts, lora.b.shape[1], padded)]
    return shapes


def _base(module: Any) -> Any:
    """The frozen layer under LoRA."""
    return getattr(module, "base_layer", module)


def _fused(modules: Sequence[Any], rank: int) -> Tensor:
    """[M + n r, K]: the modules' weights, whose parameters become views of it, and room for LoRA's first factors.

    On a card the model was loaded so (stages/model/gpt_oss.py); else it is made once for a policy, and a second step
    finds it.
    """
    bases = [_base(module) for module in modules]
    if len(bases) == 1 and not rank:
        return bases[0].weight
    rows = sum(base.weight.shape[0] for base in bases)
    shared = getattr(bases[0], "fused", None)
    if shared is not None and shared.shape[0] == rows + rank * len(bases):
        return shared
    like = bases[0].weight
    fused = torch.zeros(rows + rank * len(bases), like.shape[1], dtype=like.dtype, device=like.device)
    start = 0
    for base in bases:
        stop = start + base.weight.shape[0]
        fused[start:stop] = base.weight
        base.weight.data = fused[start:stop]
        start = stop
    bases[0].fused = fused
    return fused


def _first_factors(modules: Sequence[Any], rank: int, dtype: torch.dtype) -> Tensor:
    """[n r, K]: room for LoRA's first factors beside layers whose weights are packed."""
    base = _base(modules[0])
    return torch.zeros(rank * len(modules), base.in_features, dtype=dtype, device=base.bias.device)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x float32 [T, heads, C], first half against second half of the channels."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
