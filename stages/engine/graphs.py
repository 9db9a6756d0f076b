"""The decode step as CUDA graphs, one for each number of rows of a ladder, captured when first needed.

A step works on the slots that `rows` names, the first b of it; what is left of a graph's rows is the dummy slot. So a
few last sequences use a small graph, whichever slots they are in. All graphs share one pool of memory: they run one
after the other, and what a step leaves behind lies outside, in the slots' state and the cache.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # rows of a graph

Decode = Callable[[Tensor, bool], None]


def bucket_of(num_rows: int, max_rows: int) -> int:
    """Rows of the smallest graph that holds num_rows."""
    return next((rung for rung in LADDER if num_rows <= rung < max_rows), max_rows)


class Graphs:
    """Replays `decode(rows, filtered)`: captured on a card, called as it is where `capture` is False."""

    def __init__(self, decode: Decode, *, max_rows: int, dummy: int, device: torch.device, capture: bool) -> None:
        self._decode, self._dummy, self._capture = decode, dummy, capture
        self._rows = torch.full((max_rows,), dummy, dtype=torch.int32, device=device)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self._stream = torch.cuda.Stream(device) if capture else None
        self.capture_s = 0.0

    def __len__(self) -> int:
        return len(self._graphs)

    def prepare(self, bucket: int, *, filtered: bool) -> bool:
        """Captures the graph if it is missing and says whether it did: the rows are all the dummy's then.

        The step runs once before: kernels are compiled and workspaces made then. On the dummy's rows that changes no
        slot.
        """
        if not self._capture or (bucket, filtered) in self._graphs:
            return False
        assert self._stream is not None
        started = time.perf_counter()
        self._rows.fill_(self._dummy)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._decode(self._rows[:bucket], filtered)
            self._stream.synchronize()
            # Only this thread's calls may spoil a capture: others talk to sandboxes.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._decode(self._rows[:bucket], filtered)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._graphs[bucket, filtered] = graph
        self.capture_s += time.perf_counter() - started
        return True

    def assign(self, slots: Tensor) -> None:
        """The slots int32 of the rows from the first on; all others are the dummy's."""
        self._rows.fill_(self._dummy)
        self._rows[: slots.shape[0]] = slots

    def run(self, bucket: int, *, filtered: bool) -> None:
        """One decode step of the first `bucket` rows."""
        if self._capture:
            self._graphs[bucket, filtered].replay()
        else:
            self._decode(self._rows[:bucket], filtered)

    def clear(self) -> None:
        """Drops every graph, and with them their memory."""
        self._graphs.clear()
        if self._capture:
            self._pool = torch.cuda.graph_pool_handle()
