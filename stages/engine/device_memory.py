"""Where the cache's tensors lie: at addresses that outlive the memory behind them, so that captured graphs do too.

A CUDA graph holds the addresses of the cache. Were the cache an ordinary tensor, giving its memory back between two
rollouts would spoil every graph, and the next rollout would capture its ladder again.
"""

import torch
from torch import Tensor


class CacheMemory:
    """Ordinary tensors: on the CPU, and on a card whose driver has no virtual memory. Their addresses change."""

    stable = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held_bytes = 0  # that PyTorch's allocator does not count

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor of that name, all zero."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def give_back(self) -> None:
        """Returns the memory of every tensor; none of them may be in use any more, and the caller drops them."""


def cache_memory(device: torch.device) -> CacheMemory:
    """The best there is on `device`."""
    return CacheMemory(device)
