"""How much of the card's memory a measurement took at most."""

import gc

import torch


class Memory:
    """Watches one card; on the CPU all figures are 0.

    The cache may lie outside PyTorch's allocator, so its statistics alone do not tell: the driver's figure is sampled
    beside them, less what was in use before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.baseline = 0  # in use before we began: CUDA's context, other processes
        free_memory()
        self.baseline = self._in_use()
        self._most = 0

    def reset(self) -> None:
        """Begins anew; what is held now counts."""
        free_memory()
        self._most = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def sample(self) -> None:
        """Looks once; what is reserved stays reserved, so before anything is freed is when to look."""
        self._most = max(self._most, self._in_use())

    def row(self) -> dict[str, int]:
        """peak_bytes: ours, weights and cache and graphs and workspaces; driver_bytes: all that was in use."""
        self.sample()
        reserved = torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else 0
        return {"peak_bytes": max(reserved, self._most - self.baseline), "driver_bytes": self._most}

    def _in_use(self) -> int:
        if self.device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free


def free_memory() -> None:
    """Gives what nobody holds any more back to the driver."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Returns when the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
