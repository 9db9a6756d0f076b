"""The experts that the engine chose, kept for the update: a byte for each computed token, layer and choice.

A Runner or Step whose `routes` is a list appends each layer's choices to it as it computes. A prompt's are recorded by
its prefill, once for all its completions, and stay with it as long as it is kept; a completion's own come token by
token. Its last token leads to nothing and is not computed: P + C - 1 rows in all. Shapes: N tokens, k experts a token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.kernels.transfer import Readback

MAX_EXPERTS = 256  # that a byte can tell apart


def taken(noted: list[Tensor]) -> Tensor:
    """int [N, layers, k] of each layer's choices [N, k] in `noted`, which is empty then."""
    rows = torch.stack(noted, dim=1)
    noted.clear()
    return rows


def row_shape(config: Any) -> tuple[int, int]:
    """A token's (layers, k). Raises ValueError for more experts than a byte can tell apart."""
    if config.num_local_experts > MAX_EXPERTS:
        raise ValueError(
            f"routes are recorded of at most {MAX_EXPERTS} experts a layer, not {config.num_local_experts}"
        )
    return len(config.layer_types), int(config.num_experts_per_tok)


class PromptRoutes:
    """A prompt's routes on their way from the device, part by part as it was computed."""

    def __init__(self) -> None:
        self._parts: list[Readback] = []
        self._rows: np.ndarray | None = None

    def add(self, rows: Tensor) -> None:
        """Those of the next tokens, int [N, layers, k]."""
        self._parts.append(Readback(rows.to(torch.uint8)))

    def rows(self) -> np.ndarray:
        """uint8 [P, layers, k]. To be asked for after the last of them."""
        if self._rows is None:
            self._rows = np.concatenate([rows for part in self._parts for rows in part.wait()])
            self._parts.clear()  # pinned memory
        return self._rows


class SlotRoutes:
    """Of what runs in each slot the routes of its completion's tokens."""

    def __init__(self, shape: tuple[int, int], *, max_slots: int, max_new_tokens: int) -> None:
        # Not zeroed: the system gives only such pages as are written.
        self._rows = np.empty((max_slots, max_new_tokens, *shape), dtype=np.uint8)

    def note(self, slots: Sequence[int], places: Sequence[int], rows: np.ndarray) -> None:
        """rows int [n, layers, k]: of slots[i], its completion's token number places[i]."""
        self._rows[list(slots), list(places)] = rows

    def completion(self, slot: int, prompt: np.ndarray, num_tokens: int) -> Tensor:
        """uint8 [P + num_tokens - 1, layers, k] of the slot's completion and its prompt."""
        return torch.from_numpy(np.concatenate((prompt, self._rows[slot, : num_tokens - 1])))
