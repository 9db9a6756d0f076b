"""How this project's kernels are launched, and how what is too much at once is cut."""

import os
from typing import Any, Literal

import torch
from torch import Tensor

Path = Literal["auto", "triton"]  # Triton on a card and plain PyTorch on a CPU; Triton anywhere, by its interpreter


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_hopper(tensor: Tensor) -> bool:
    """Whether the tensor lies on a card of compute capability 9.0 or more."""
    return tensor.is_cuda and not interpreted() and torch.cuda.get_device_capability(tensor.device) >= (9, 0)


def asm(tensor: Tensor) -> bool:
    """Whether kernels may use inline PTX: bfloat16 products in pairs exist from compute capability 9.0 on."""
    return on_hopper(tensor)


def launch_options(tensor: Tensor, *, warps: int) -> dict[str, Any]:
    """Keyword arguments of a kernel with a PDL flag: programmatic dependent launch, where there is such a thing.

    A kernel so launched may begin before the one before it has ended, and waits for it where it says gdc_wait.
    """
    pdl = on_hopper(tensor)
    options: dict[str, Any] = {"PDL": pdl, "num_warps": warps}
    if pdl:
        options["launch_pdl"] = True
    return options


class _Forgetful:
    """In place of a function's context where no backward comes."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keeps nothing."""


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args); where gradients are off its forward alone, as autograd's bookkeeping would keep the host
    busy for as long as several launches do.
    """
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(_Forgetful(), *args)


def aligned_rows(*shape: int, like: Tensor) -> Tensor:
    """An empty tensor of this shape, in the dtype of `like`, whose rows begin at multiples of 128 bytes, where whole
    cache lines are: products of rows of 2 896 bfloat16 numbers and writing them are slower without.
    """
    line = 128 // like.element_size()
    *outer, width = shape
    return torch.empty(*outer, -(-width // line) * line, dtype=like.dtype, device=like.device)[..., :width]


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def slices(size: int, at_once: int) -> list[slice]:
    """0 ... size - 1, so many at once."""
    return [slice(start, min(start + at_once, size)) for start in range(0, size, at_once)]
