"""Attention projections and the unembedding in NF4 (Dettmers et al. 2023, "QLoRA"), by bitsandbytes: blocks of
64 weights share a float32 scale, 4.5 bits a weight.

gpt-oss-20b's attention takes 0.36 GB so instead of 1.27, its unembedding 0.33 GB instead of 1.16. The price: every
product first unpacks its weights to the compute dtype, so decoding is slower (README tells how much), and the
weights are no longer the checkpoint's own.
"""

import functools
import importlib
import logging
from typing import Any, cast

import torch
from torch import Tensor, nn

from stages.kernels.linear import linear

CHUNK_ROWS = 8192  # rows of the unembedding unpacked at once: 47 MB of gpt-oss's in 16 bits


def bitsandbytes() -> Any:
    """The library, without its advice to install kernels for the CPU, which nothing here would use."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return importlib.import_module("bitsandbytes")


@functools.cache
def _layer_class() -> Any:
    class Nf4Linear(bitsandbytes().nn.Linear4bit):  # type: ignore[misc]
        """Multiplies by the unpacked weights. The library's own forward takes other kernels for a single row, and on
        CPUs with bfloat16 instructions computes in bfloat16: a row's bits would depend on its batch and on the machine.
        """

        def forward(self, hidden: Tensor) -> Tensor:
            return nn.functional.linear(hidden, dense_weight(self), self.bias)

    return Nf4Linear


def nf4_layer(dense: nn.Linear) -> nn.Module:
    """The linear layer in NF4; the bias stays as it is."""
    packed = _layer_class()(dense.in_features, dense.out_features, compute_dtype=dense.weight.dtype, quant_type="nf4")
    packed.weight = bitsandbytes().nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4")
    packed.bias = dense.bias
    return cast(nn.Module, packed.to(dense.weight.device))


def dense_weight(layer: nn.Module) -> Tensor:
    """A linear layer's weight [M, K], unpacked if it is in NF4."""
    weight = cast(Tensor, layer.weight)
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    return cast(Tensor, bitsandbytes().functional.dequantize_4bit(weight.data, state))


class Nf4Head(nn.Module):
    """The unembedding [V, D] in NF4. `head[start:stop]` unpacks some rows; no more than CHUNK_ROWS ever are at once."""

    def __init__(self, weight: Tensor) -> None:
        """Raises ValueError when chunks of rows would cut blocks of weights."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = weight.dtype
        packed, state = bitsandbytes().functional.quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
        if self.in_features % 64:
            raise ValueError(f"an unembedding of {self.in_features} inputs does not fall into blocks of 64 weights")
        self.packed = nn.Buffer(packed.view(-1))  # uint8, two codes a byte
        self.scales = nn.Buffer(state.absmax)  # float32, one for 64 weights
        self.code = nn.Buffer(state.code)  # float32, what the 16 codes stand for

    @property
    def shape(self) -> tuple[int, int]:
        """V, D."""
        return self.out_features, self.in_features

    def __getitem__(self, rows: slice) -> Tensor:
        """The rows start:stop [n, D] in the compute dtype; start is a multiple of CHUNK_ROWS."""
        functional = bitsandbytes().functional
        start, stop, _ = rows.indices(self.out_features)
        assert start % CHUNK_ROWS == 0
        first, last = start * self.in_features, stop * self.in_features
        state = functional.QuantState(
            absmax=self.scales[first // 64 : -(-last // 64)],
            shape=torch.Size((stop - start, self.in_features)),
            code=self.code,
            dtype=self.compute_dtype,
            blocksize=64,
            quant_type="nf4",
        )
        return cast(Tensor, functional.dequantize_4bit(self.packed[first // 2 : -(-last // 2)].view(-1, 1), state))

    def rows(self, indices: Tensor) -> Tensor:
        """[n, D] in the compute dtype of indices int64 [n]. A byte's upper half is the first of its two codes."""
        codes = self.packed.view(self.out_features, -1)[indices]
        values = self.code[torch.stack((codes >> 4, codes & 15), dim=-1).flatten(1).int()]
        scales = self.scales.view(self.out_features, -1)[indices]
        return (values.unflatten(1, (-1, 64)) * scales[:, :, None]).flatten(1).to(self.compute_dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden [..., D], in its dtype."""
        return unembed(self, hidden.flatten(0, -2)).to(hidden.dtype).unflatten(0, hidden.shape[:-1])


def unembed(head: nn.Module, hidden: Tensor) -> Tensor:
    """Logits float32 [N, V] of hidden [N, D], without gradients."""
    if not isinstance(head, Nf4Head):
        return linear(hidden, cast(Tensor, head.weight), dtype=torch.float32)
    logits = torch.empty(hidden.shape[0], head.out_features, dtype=torch.float32, device=hidden.device)
    for start in range(0, head.out_features, CHUNK_ROWS):
        logits[:, start : start + CHUNK_ROWS] = linear(hidden, head[start : start + CHUNK_ROWS], dtype=torch.float32)
    return logits
