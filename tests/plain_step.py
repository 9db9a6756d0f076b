"""A Step of plain PyTorch over the paged cache, one row at a time: the paged engine's oracle on the CPU."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stages.engine.cache import LayerCache
from stages.engine.pages import PAGE
from stages.engine.runner import Runner
from stages.kernels import reference
from stages.model.policy import Policy


class PlainStep:
    def __init__(self, policy: Policy, max_rows: int, max_context: int) -> None:
        self.runner = Runner(policy)
        self.policy, self.max_rows, self.max_context = policy, max_rows, max_context
        self.num_attached = 0
        self.rows: list[int] = []  # of every step
        self.prefills: list[tuple[int, int]] = []  # tokens and past of every prefill

    @property
    def routes(self) -> list[Tensor] | None:
        return self.runner.routes

    @routes.setter
    def routes(self, noted: list[Tensor] | None) -> None:
        self.runner.routes = noted

    def attach(self, _memory: object) -> None:
        self.num_attached += 1

    def detach(self) -> None:
        pass

    def embed_and_decode(
        self, rows: Tensor, tokens: Tensor, positions: Tensor, page_table: Tensor, layers: Sequence[LayerCache]
    ) -> Tensor:
        assert rows.shape[0] <= self.max_rows
        slots = rows.long()
        at = positions[slots].long()
        assert int(at.max()) < self.max_context
        self.rows.append(rows.shape[0])

        def attend(index: int, attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = layers[index]
            window = attention.sliding_window
            if window:
                keys[slots, :, at % window], values[slots, :, at % window] = key, value
            else:
                page = page_table[slots, at // PAGE].long()
                keys[page, :, at % PAGE], values[page, :, at % PAGE] = key, value
            outs = []
            for row, (slot, position) in enumerate(zip(slots.tolist(), at.tolist(), strict=True)):
                if window:
                    ring = torch.arange(max(0, position - window + 1), position + 1) % window
                    seen = keys[slot][:, ring], values[slot][:, ring]
                else:
                    pages = page_table[slot, : position // PAGE + 1].long()
                    seen = tuple(x[pages].transpose(0, 1).flatten(1, 2)[:, : position + 1] for x in (keys, values))
                outs.append(one(query[row : row + 1], *seen, attention, torch.ones(1, 1, dtype=torch.bool)))
            return torch.cat(outs)

        hidden = self.runner._forward(tokens[slots], at, attend)
        return self.policy.model.lm_head(hidden)

    def prefill(
        self,
        ids: Tensor,
        starts: Sequence[int],
        past: int,
        past_kv: Callable[[int], tuple[Tensor, Tensor]] | None,
        write_kv: Callable[[int, Tensor, Tensor], None],
    ) -> Tensor:
        assert (past_kv is None) == (past == 0)
        self.prefills.append((len(ids), past))
        stops = [*starts[1:], len(ids)]
        documents = [slice(*ends) for ends in zip(starts, stops, strict=True)]
        positions = torch.cat([torch.arange(part.stop - part.start) for part in documents]) + past

        def attend(index: int, attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            before = [part.transpose(0, 1) for part in past_kv(index)] if past_kv else [key.transpose(0, 1)[:, :0]] * 2
            outs = []
            for part in documents:
                seen = [
                    torch.cat((old, new[part].transpose(0, 1)), dim=1)
                    for old, new in zip(before, (key, value), strict=True)
                ]
                window = attention.sliding_window
                visible = reference.causal_window(part.stop - part.start, seen[0].shape[1], window)
                outs.append(one(query[part], *seen, attention, visible))
            write_kv(index, key, value)
            return torch.cat(outs)

        hidden = self.runner._forward(ids, positions, attend)
        return self.policy.model.lm_head(hidden[[stop - 1 for stop in stops]])


def one(query: Tensor, keys: Tensor, values: Tensor, attention: Any, visible: Tensor) -> Tensor:
    """Attention [T, H, C] of query [T, H, C] over keys and values [K, L, C]."""
    out = reference.sink_attention(
        query.transpose(0, 1)[None],
        keys[None],
        values[None],
        attention.sinks,
        scale=attention.scaling,
        visible=visible,
    )
    return out[0].transpose(0, 1)
