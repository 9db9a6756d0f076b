"""Tokens through the model: a whole prompt at once, then one token for every slot.

The runner walks the policy's own layers, LoRA included and never merged, so what the trainer changes is what the next
token sees. Decode always computes all S slots, empty ones too: on the CPU a row's bits then depend on its own sequence
alone. Shapes: S slots, T tokens, D hidden, H query heads, K key/value heads, C channels, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stages.engine.cache import Cache, Prompt
from stages.engine.routes import taken
from stages.kernels.attention import Partial, apply_sinks, attend, merge, sink_attention
from stages.model.policy import Policy

# From a layer's query [N, H, C], key and value [N, K, C], all with RoPE applied, to its attention output [N, H, C].
Attend = Callable[[int, Any, Tensor, Tensor, Tensor], Tensor]

OWN_BLOCK = 64  # tokens of a completion attended to at once; their number grows with the longest completion


class Runner:
    """Runs a policy's model for the engine."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.config = policy.model.config
        self._decoder = policy.model.model
        self.routes: list[Tensor] | None = None  # a list takes each layer's choices int64 [N, k]

    def prefill(self, prompt_ids: tuple[int, ...]) -> Prompt:
        """Computes a prompt of T tokens, alone, so that its keys do not depend on what else is waiting."""
        all_keys: list[Tensor] = []
        all_values: list[Tensor] = []

        def attend_prompt(_: int, attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            window = attention.sliding_window
            query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
            kept = slice(None) if window is None else slice(-window, None)
            all_keys.append(key[0, :, kept].clone())
            all_values.append(value[0, :, kept].clone())
            out = sink_attention(query, key, value, attention.sinks, scale=attention.scaling, window=window)
            return out[0].transpose(0, 1)

        ids = torch.tensor(prompt_ids, device=self.policy.device)
        hidden = self._forward(ids, torch.arange(len(prompt_ids), device=self.policy.device), attend_prompt)
        logits = self.policy.model.lm_head(hidden[-1:])[0]
        routes = None if self.routes is None else taken(self.routes).to(torch.uint8)
        return Prompt(keys=all_keys, values=all_values, logits=logits, num_tokens=len(prompt_ids), routes=routes)

    def decode(self, cache: Cache, tokens: Tensor, steps: Tensor) -> Tensor:
        """Logits [S, V] after `tokens` int64 [S], each its slot's completion token number `steps` int64 [S]."""
        slots = torch.arange(tokens.shape[0], device=tokens.device)
        positions = cache.prompt_lengths + steps
        longest = int(steps.max()) + 1
        own_visible = torch.arange(longest + OWN_BLOCK, device=tokens.device) <= steps[:, None]
        ring_visible = torch.arange(cache.window, device=tokens.device) <= positions[:, None]
        residents = self._residents(cache)

        def attend_slots(index: int, attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = cache.layers[index]
            sliding = cache.sliding[index]
            place = positions % cache.window if sliding else steps
            keys[slots, :, place] = key
            values[slots, :, place] = value
            grouped = query.unflatten(1, (key.shape[1], -1))  # [S, K, H / K, C]
            scale = attention.scaling
            if sliding:
                partial = attend(grouped, keys, values, scale=scale, visible=ring_visible[:, None, None])
            else:
                partial = self._attend_own(grouped, keys, values, own_visible, scale=scale, longest=longest)
                for prompt, rows in residents:
                    shared = self._attend_shared(grouped, prompt.keys[index], prompt.values[index], scale)
                    merged = merge(shared, partial)
                    partial = merged if rows is None else _select(rows, merged, partial)
            return apply_sinks(partial, attention.sinks.view(1, key.shape[1], -1)).flatten(1, 2)

        with self.policy.fixed_shape_experts():
            hidden = self._forward(tokens, positions, attend_slots)
        return self.policy.model.lm_head(hidden)

    def _forward(self, ids: Tensor, positions: Tensor, attend_layer: Attend) -> Tensor:
        """Final hidden states [N, D] of N tokens, which `attend_layer` relates to one another."""
        hidden = self.policy.embed(ids)
        cos, sin = self._decoder.rotary_emb(hidden, positions[None])
        cos, sin = cos[0][:, None], sin[0][:, None]  # [N, 1, C / 2]
        channels = self.config.head_dim
        for index, layer in enumerate(self._decoder.layers):
            attention = layer.self_attn
            normed = layer.input_layernorm(hidden)
            query = _rotate(attention.q_proj(normed).unflatten(-1, (-1, channels)), cos, sin)
            key = _rotate(attention.k_proj(normed).unflatten(-1, (-1, channels)), cos, sin)
            value = attention.v_proj(normed).unflatten(-1, (-1, channels))
            attended = attend_layer(index, attention, query, key, value)
            hidden = hidden + attention.o_proj(attended.flatten(-2))
            normed = layer.post_attention_layernorm(hidden)
            _, routing, chosen = layer.mlp.router(normed)
            if self.routes is not None:
                self.routes.append(chosen)
            hidden = hidden + layer.mlp.experts(normed, chosen, routing)
        return self._decoder.norm(hidden)

    @staticmethod
    def _attend_own(
        query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, *, scale: float, longest: int
    ) -> Partial:
        """Every slot's query [S, K, G, C] over its own completion, a block of tokens at a time up to the longest one's.

        For a shorter completion the blocks past its end merge with weight 0, exactly, so its bits do not depend on who
        the longest is.
        """
        partials = [
            attend(query, keys[:, :, block], values[:, :, block], scale=scale, visible=visible[:, None, None, block])
            for block in (slice(s, min(s + OWN_BLOCK, keys.shape[2])) for s in range(0, longest, OWN_BLOCK))
        ]
        return functools.reduce(merge, partials)

    @staticmethod
    def _attend_shared(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
        """Every slot's query [S, K, G, C] over one prompt's keys [K, L, C]: one product for all who share it."""
        num_slots, kv_heads, groups, channels = query.shape
        rows = query.transpose(0, 1).reshape(kv_heads, num_slots * groups, channels)
        out, lse = attend(rows, keys, values, scale=scale)
        # Contiguous: elementwise functions take another code path, with other last bits, on strided memory.
        return Partial(
            out.view(kv_heads, num_slots, groups, channels).transpose(0, 1).contiguous(),
            lse.view(kv_heads, num_slots, groups).transpose(0, 1).contiguous(),
        )

    @staticmethod
    def _residents(cache: Cache) -> list[tuple[Prompt, Tensor | None]]:
        """Prompts that slots attend to, each with its slots, bool [S] (None when it is the only prompt)."""
        used = list(dict.fromkeys(ids for ids in cache.prompt_of if ids is not None))
        if len(used) == 1:
            return [(cache.prompts[used[0]], None)]
        device = cache.prompt_lengths.device
        owners = {ids: torch.tensor([owner == ids for owner in cache.prompt_of], device=device) for ids in used}
        return [(cache.prompts[ids], rows) for ids, rows in owners.items()]


def _select(rows: Tensor, chosen: Partial, other: Partial) -> Partial:
    """`chosen` in the slots `rows` bool [S], `other` elsewhere."""
    return Partial(
        torch.where(rows[:, None, None, None], chosen.out, other.out),
        torch.where(rows[:, None, None], chosen.lse, other.lse),
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [N, heads, C], first half against second half of the channels."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
