"""How much of the card's memory a measurement took at most."""

import contextlib
import gc
import threading
from collections.abc import Iterator

import torch

WATCH_EVERY_S = 0.05  # a look takes some ten microseconds
OVERSHOOT_BYTES = 64 << 20  # segments that grow in place may go beyond PyTorch's limit by a page or two


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
            torch.cuda.reset_peak_host_memory_stats()

    def sample(self) -> None:
        """Looks once; what is reserved stays reserved, so before anything is freed is when to look."""
        self._most = max(self._most, self._in_use())

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within it another thread looks again and again, as what runs may take memory and give it back itself."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(WATCH_EVERY_S):
                self.sample()

        thread = threading.Thread(target=look, daemon=True)
        if self.device.type == "cuda":
            thread.start()
        try:
            yield
        finally:
            over.set()
            if thread.ident is not None:
                thread.join()
            self.sample()

    def row(self) -> dict[str, int]:
        """peak_bytes: ours, weights and cache and graphs and workspaces; driver_bytes: all that was in use."""
        self.sample()
        reserved = torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else 0
        return {"peak_bytes": max(reserved, self._most - self.baseline), "driver_bytes": self._most}

    def details(self) -> dict[str, int]:
        """`row` and the allocator's own peaks: reserved_bytes, allocated_bytes, and pinned_bytes of the host."""
        found = {"reserved_bytes": 0, "allocated_bytes": 0, "pinned_bytes": 0}
        if self.device.type == "cuda":
            host = torch.cuda.host_memory_stats()
            found = {
                "reserved_bytes": torch.cuda.max_memory_reserved(self.device),
                "allocated_bytes": torch.cuda.max_memory_allocated(self.device),
                "pinned_bytes": int(host.get("allocated_bytes.peak", 0)),
            }
        return self.row() | found

    def _in_use(self) -> int:
        if self.device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free


def cap_memory(device: torch.device, cap_bytes: float) -> int | None:
    """Lets PyTorch's allocator reserve no more than so many bytes of the card, 0 for all of it; the cap, None on a CPU
    or for all. What others take of the driver (an engine's cache, CUDA's context) does not count.
    """
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    fraction = min((cap_bytes - OVERSHOOT_BYTES) / total, 1.0) if cap_bytes else 1.0
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    return int(cap_bytes) if cap_bytes and fraction < 1 else None


def free_memory() -> None:
    """Gives what nobody holds any more back to the driver."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Returns when the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
