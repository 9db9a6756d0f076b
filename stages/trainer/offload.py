"""What each block was given, kept until backward comes to it: on a card in the host's memory, copied beside the
computation. gpt-oss-20b's 48 blocks are given 276 kB a token in 16 bits.

The host's memory is one piece, pinned as it is: PyTorch's own allocator of pinned memory rounds to powers of two. On
the card one tensor leaves and two come back at a time, in places of their own, so that it does not hang on how far the
host is ahead how much of the card they take.
"""

import weakref

import torch
from torch import Tensor


class LayerStore:
    """Keeps the tensors of one forward pass: `begin`, `place` and `put` in order, `take` in the reverse order.

    On the CPU it keeps the tensors themselves. The host's memory stays pinned for the next pass until `close`, or
    until nobody holds the store.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[int, Tensor] = {}
        self._leaving: Tensor | None = None
        self._left: torch.cuda.Event | None = None  # when the tensor before has been copied
        self._places: Tensor | None = None  # of two that come back
        self._arriving: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        self._host: Tensor | None = None
        self._unpin: weakref.finalize[[torch.device, Tensor], LayerStore] | None = None
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, num_tensors: int, *, like: Tensor, dtype: torch.dtype) -> None:
        """Makes room for so many tensors of this shape; those of a pass that did not end are forgotten."""
        self._forget()
        shape = tuple(like.shape)
        if self._side is None:
            self._kept = {index: torch.empty(shape, dtype=dtype) for index in range(num_tensors)}
            return
        needed = num_tensors * like.numel() * dtype.itemsize
        if self._host is None or self._host.nbytes < needed:
            self.close()
            host = torch.empty(needed, dtype=torch.uint8)
            _checked(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), needed, 0))
            # A store that nobody closed must not leave its pages pinned: whoever is given them next could not pin them.
            self._unpin = weakref.finalize(self, _unpin, self.device, host)
            self._unpin.atexit = False
            self._host = host
        host = self._host[:needed].view(dtype).view(num_tensors, *shape)
        self._kept = dict(enumerate(host))
        self._leaving = torch.empty(shape, dtype=dtype, device=self.device)

    def place(self, index: int) -> Tensor:
        """Where tensor `index` is to be written before it is put."""
        if self._side is None:
            return self._kept[index]
        assert self._leaving is not None
        if self._left is not None:
            torch.cuda.current_stream(self.device).wait_event(self._left)
        return self._leaving

    def put(self, index: int) -> None:
        """Keeps what stands in the place of tensor `index`."""
        if self._side is None:
            return
        assert self._leaving is not None
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            self._kept[index].copy_(self._leaving, non_blocking=True)
            self._left = torch.cuda.Event()
            self._left.record()
        if index == len(self._kept) - 1:
            self._leaving.record_stream(self._side)
            self._leaving = None

    def take(self, index: int) -> Tensor:
        """Tensor `index`, which is there until the one before it is taken, and begins to come back now."""
        if self._side is None:
            return self._kept.pop(index)
        if index not in self._arriving:
            self._fetch(index)
        tensor, event = self._arriving.pop(index)
        torch.cuda.current_stream(self.device).wait_event(event)
        if index:
            self._fetch(index - 1)
        else:
            self._places = None
        return tensor

    def close(self) -> None:
        """Gives the host's memory back."""
        self._forget()
        if self._unpin is not None:
            self._unpin()
        self._host = self._unpin = None

    def _fetch(self, index: int) -> None:
        host = self._kept.pop(index)
        if self._places is None:
            self._places = torch.empty(2, *host.shape, dtype=host.dtype, device=self.device)
        tensor = self._places[index % 2]
        assert self._side is not None
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            tensor.copy_(host, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._arriving[index] = (tensor, event)

    def _forget(self) -> None:
        """Drops what a pass holds, once no copy uses it."""
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        self._kept.clear()
        self._arriving.clear()
        self._leaving = self._left = self._places = None


def _unpin(device: torch.device, host: Tensor) -> None:
    torch.cuda.synchronize(device)
    _checked(torch.cuda.cudart().cudaHostUnregister(host.data_ptr()))


def _checked(error: object) -> None:
    if int(error) != 0:  # type: ignore[call-overload]
        raise RuntimeError(f"the host's memory could not be pinned: {error}")
