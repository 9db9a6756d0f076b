"""Keys and values: a prompt's once for all the completions that share it, a completion's own per slot.

In a full layer a slot holds only its completion's tokens, and the prompt is attended to where it lies. A sliding
layer's slot is a ring of exactly `window` tokens, token p at p % window, into which the prompt's last tokens are copied
at admission. Keys are stored with RoPE applied. Shapes: S slots, K key/value heads, C channels, L prompt tokens, W
window.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class LayerCache(NamedTuple):
    """One layer's slots; keys and values [S, K, max_new_tokens, C] in a full layer, [S, K, W, C] in a sliding one."""

    keys: Tensor
    values: Tensor


class Prompt(NamedTuple):
    """A prompt that has been computed. keys and values, per layer: [K, L, C], or a sliding layer's last min(L, W)
    tokens.
    """

    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor  # [V], of the token that follows the prompt
    num_tokens: int
    routes: Tensor | None = None  # uint8 [L, layers, k], where they are recorded


class Cache:
    """The memory of the engine."""

    def __init__(
        self, config: Any, *, max_slots: int, max_new_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.window = int(config.sliding_window)
        self.sliding = [kind == "sliding_attention" for kind in config.layer_types]
        self.layers = []
        for sliding in self.sliding:
            shape = (max_slots, config.num_key_value_heads, self.window if sliding else max_new_tokens, config.head_dim)
            keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            self.layers.append(LayerCache(keys, values))
        self.prompts: dict[tuple[int, ...], Prompt] = {}
        self.prompt_of: list[tuple[int, ...] | None] = [None] * max_slots
        self.prompt_lengths = torch.zeros(max_slots, dtype=torch.int64, device=device)

    def assign(self, slot: int, prompt_ids: tuple[int, ...]) -> None:
        """Gives `slot` to a completion of a prompt that is in `prompts`."""
        prompt = self.prompts[prompt_ids]
        self.prompt_of[slot] = prompt_ids
        self.prompt_lengths[slot] = prompt.num_tokens
        tail = min(prompt.num_tokens, self.window)
        ring = (
            torch.arange(prompt.num_tokens - tail, prompt.num_tokens, device=self.prompt_lengths.device) % self.window
        )
        for layer, sliding, keys, values in zip(self.layers, self.sliding, prompt.keys, prompt.values, strict=True):
            if sliding:
                layer.keys[slot, :, ring] = keys
                layer.values[slot, :, ring] = values

    def release(self, slot: int, prompt_ids: tuple[int, ...] | None) -> None:
        """Frees `slot`, and the prompt `prompt_ids` when nobody needs it any more."""
        self.prompt_of[slot] = None
        if prompt_ids is not None:
            self.prompts.pop(prompt_ids, None)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        slots = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)
        prompts = sum(t.nbytes for prompt in self.prompts.values() for t in (*prompt.keys, *prompt.values))
        return slots + prompts
