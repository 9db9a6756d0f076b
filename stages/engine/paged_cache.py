"""The GPU engine's keys and values: pages of 128 tokens in full layers, rings of the window in sliding ones.

A full layer's keys and values are [num_pages, K, 128, C] each; a slot's page table says where its tokens lie. A sliding
layer's are [rows, K, W, C], token p of a slot at p % W of its row: first the slots, then the dummy's, then those of
kept prompts (stages/engine/pages.py says which pages and rows belong to whom). Keys are stored with RoPE applied.
Shapes: S slots, P pages of the longest context, K key/value heads, C channels, W window, T tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.engine.cache import LayerCache
from stages.engine.device_memory import CacheMemory
from stages.engine.pages import KEPT_PROMPTS, PAGE
from stages.kernels.transfer import upload

WriteLayer = Callable[[int, Tensor, Tensor], None]


class Sizes(NamedTuple):
    """Bytes of a cache for a model."""

    page: int  # a page, in all full layers
    rings: int  # all sliding layers' rows, whatever the number of pages

    @classmethod
    def of(cls, config: Any, *, max_slots: int, dtype: torch.dtype) -> "Sizes":
        sliding = sum(kind == "sliding_attention" for kind in config.layer_types)
        token = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize  # of one layer, key and value
        rows = max_slots + 1 + KEPT_PROMPTS
        full = len(config.layer_types) - sliding
        return cls(page=full * PAGE * token, rings=sliding * rows * int(config.sliding_window) * token)

    def pages_in(self, budget: int) -> int:
        """Pages that a cache of `budget` bytes has, the scratch page included; 0 or less if none fits."""
        return (budget - self.rings) // self.page


class Span(NamedTuple):
    """`length` tokens of a slot's prompt from position `begin` on, as they lie in a packed prefill."""

    slot: int
    pages: Sequence[int]
    begin: int
    length: int


class Copy(NamedTuple):
    """A prompt's last, partial page (None: it ends with a page) and its sliding rows, to somebody else."""

    row_from: int
    row_to: int
    page_from: int | None
    page_to: int | None


class PagedCache:
    """The tensors of one run; zero at first, so that what no token has written is finite."""

    def __init__(self, config: Any, *, max_slots: int, num_pages: int, dtype: torch.dtype, memory: CacheMemory) -> None:
        self.window = int(config.sliding_window)
        self.device = memory.device
        self.sliding = [kind == "sliding_attention" for kind in config.layer_types]
        heads, channels = config.num_key_value_heads, config.head_dim
        rows = max_slots + 1 + KEPT_PROMPTS
        self.layers: list[LayerCache] = []
        for index, sliding in enumerate(self.sliding):
            shape = (rows, heads, self.window, channels) if sliding else (num_pages, heads, PAGE, channels)
            keys, values = (memory.zeros(f"{index}.{kind}", shape, dtype) for kind in ("keys", "values"))
            self.layers.append(LayerCache(keys, values))

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def writer(self, spans: Sequence[Span]) -> WriteLayer:
        """What stores a packed prefill's keys and values [T, K, C] of a layer where the spans belong."""
        pages, offsets, taken, rows, places = [], [], [], [], []
        start = 0
        for span in spans:
            at = np.arange(span.begin, span.begin + span.length)
            pages.append(np.asarray(span.pages)[at // PAGE])
            offsets.append(at % PAGE)
            tail = at[-self.window :]  # earlier tokens would be overwritten by later ones of the same copy
            taken.append(tail - span.begin + start)
            rows.append(np.full(len(tail), span.slot))
            places.append(tail % self.window)
            start += span.length
        index = [
            upload(np.concatenate(part), torch.int64, self.device) for part in (pages, offsets, taken, rows, places)
        ]
        page, offset, take, row, place = index

        def write(layer: int, keys: Tensor, values: Tensor) -> None:
            for cached, new in zip(self.layers[layer], (keys, values), strict=True):
                if self.sliding[layer]:
                    cached[row, :, place] = new[take]
                else:
                    cached[page, :, offset] = new

        return write

    def reader(self, span: Span) -> Callable[[int], tuple[Tensor, Tensor]]:
        """What returns a layer's keys and values of a slot's first span.begin tokens, in their order: [begin, K, C], or
        a sliding layer's last min(begin, W), which must be asked for before the span itself is written.
        """
        tail = np.arange(max(0, span.begin - self.window), span.begin) % self.window
        places = upload(tail, torch.int64, self.device)
        pages = upload(span.pages[: -(-span.begin // PAGE)], torch.int64, self.device)

        def read(layer: int) -> tuple[Tensor, Tensor]:
            keys, values = self.layers[layer]
            if self.sliding[layer]:
                return keys[span.slot][:, places].transpose(0, 1), values[span.slot][:, places].transpose(0, 1)
            tokens = [x[pages].transpose(1, 2).flatten(0, 1)[: span.begin] for x in (keys, values)]
            return tokens[0], tokens[1]

        return read

    def copy(self, copies: Sequence[Copy]) -> None:
        """Carries the copies out; none reads what another writes."""
        if not copies:
            return
        paged = [copy for copy in copies if copy.page_from is not None]
        rows_from, rows_to, pages_from, pages_to = (
            upload(numbers, torch.int64, self.device)
            for numbers in (
                [copy.row_from for copy in copies],
                [copy.row_to for copy in copies],
                [copy.page_from for copy in paged],
                [copy.page_to for copy in paged],
            )
        )
        for layer, sliding in zip(self.layers, self.sliding, strict=True):
            source, target = (rows_from, rows_to) if sliding else (pages_from, pages_to)
            if sliding or paged:
                for cached in layer:
                    cached[target] = cached[source]
