"""Small tensors to the device and back without waiting for it.

A copy from or to ordinary memory stalls until the stream is empty; through pinned memory it takes its turn like a
kernel. PyTorch's allocator of pinned memory hands a block out again only when the copies that used it have ended.
"""

import numpy as np
import torch
from torch import Tensor


def upload(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor on `device` with `values` (numbers, lists of them, or a numpy array), ordered on its stream."""
    tensor = torch.as_tensor(np.asarray(values)).to(dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.clone()


class Readback:
    """What tensors of a device hold at this point of its stream, to be read when it has got there."""

    def __init__(self, *sources: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if sources[0].is_cuda:
            self._copies = [torch.empty(source.shape, dtype=source.dtype, pin_memory=True) for source in sources]
            for copy, source in zip(self._copies, sources, strict=True):
                copy.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event(blocking=True)  # the waiting thread leaves its core to the sandboxes
            self._event.record()
        else:
            self._copies = [source.clone() for source in sources]

    def wait(self) -> list[np.ndarray]:
        """The values of each, once the device has written them."""
        if self._event is not None:
            self._event.synchronize()
        return [copy.numpy() for copy in self._copies]
