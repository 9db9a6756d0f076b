"""What each block was given, kept until backward comes to it: on a card in the host's memory, copied beside the
computation. gpt-oss-20b's 48 blocks are given 276 kB a token in 16 bits.

The host's memory is one piece, pinned as it is: PyTorch's own allocator of pinned memory rounds to powers of two.
"""

import weakref

import torch
from torch import Tensor


class LayerStore:
    """Keeps the tensors of one forward pass. `put` in order, `take` in the reverse order.

    On the CPU it keeps the tensors themselves. The host's memory stays pinned for the next pass until `close`, or
    until nobody holds the store.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[int, Tensor] = {}
        self._arriving: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        self._host: Tensor | None = None
        self._unpin: weakref.finalize[[torch.device, Tensor], LayerStore] | None = None
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(self, index: int, tensor: Tensor, *, num_tensors: int) -> None:
        """Keeps tensor `index` of so many; all have the same shape."""
        if self._side is None:
            self._kept[index] = tensor
            return
        host = self._slab(index, tensor, num_tensors)
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._side)
        self._kept[index] = host

    def take(self, index: int) -> Tensor:
        """Tensor `index`, which is forgotten; the one before it begins to come back."""
        if self._side is None:
            return self._kept.pop(index)
        self._fetch(index)
        tensor, event = self._arriving.pop(index)
        torch.cuda.current_stream(self.device).wait_event(event)
        if index - 1 in self._kept:
            self._fetch(index - 1)
        return tensor

    def close(self) -> None:
        """Gives the host's memory back."""
        self._kept.clear()
        self._arriving.clear()
        if self._unpin is not None:
            self._unpin()
        self._host = self._unpin = None

    def _fetch(self, index: int) -> None:
        if index in self._arriving:
            return
        host = self._kept.pop(index)
        tensor = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        assert self._side is not None
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            tensor.copy_(host, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        tensor.record_stream(self._side)
        self._arriving[index] = (tensor, event)

    def _slab(self, index: int, tensor: Tensor, num_tensors: int) -> Tensor:
        """The place of tensor `index` in the host's memory, which grows when a pass needs more."""
        if index == 0:
            self._kept.clear()
            self._arriving.clear()
        needed = num_tensors * tensor.nbytes
        if self._host is None or self._host.nbytes < needed:
            assert index == 0, "the tensors differ in size"
            self.close()
            host = torch.empty(needed, dtype=torch.uint8)
            _checked(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), needed, 0))
            # A store that nobody closed must not leave its pages pinned: whoever is given them next could not pin them.
            self._unpin = weakref.finalize(self, _unpin, self.device, host)
            self._unpin.atexit = False
            self._host = host
        start = index * tensor.nbytes
        return self._host[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _unpin(device: torch.device, host: Tensor) -> None:
    torch.cuda.synchronize(device)
    _checked(torch.cuda.cudart().cudaHostUnregister(host.data_ptr()))


def _checked(error: object) -> None:
    if int(error) != 0:  # type: ignore[call-overload]
        raise RuntimeError(f"the host's memory could not be pinned: {error}")
