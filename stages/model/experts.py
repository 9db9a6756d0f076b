"""The experts of one gpt-oss layer as a module: frozen weights, dense or MXFP4, and factored LoRA beside them.

Takes the place of transformers' GptOssExperts (same call, same parameter names for dense weights) because that one can
hold neither packed weights nor factored LoRA.
"""

from typing import Any

import torch
from torch import Tensor, nn

from stages.kernels.experts import Lora, experts, experts_fixed_shape
from stages.kernels.packed_experts import Relaid
from stages.kernels.packed_experts import dequantize as dequantize_relaid
from stages.kernels.trained_experts import ALL_AT_ONCE, FrozenExperts, Tiling, frozen_experts, trained_experts
from stages.model.mxfp4 import Mxfp4, dequantize
from stages.model.mxfp4_layout import fits, relay


class DenseWeight(nn.Module):
    """E matrices kept as [E, in, out], transformers' orientation."""

    packed = False
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)  # [E, in, out]
        self.bias = nn.Parameter(bias, requires_grad=False)  # [E, out]
        self.num_experts, self.in_features, self.out_features = weight.shape

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        return self.weight[expert].to(dtype)

    def stack(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class PackedWeight(nn.Module):
    """E matrices kept as MXFP4: on a CPU the checkpoint's own bytes, blocks [E, out, in / 32, 16] and scales
    [E, out, in / 32]; on a GPU, where they fit it, the same bytes in the order its kernels read them.
    """

    packed = True
    bias: Tensor

    def __init__(self, quantized: Mxfp4, bias: Tensor, *, interleaved: bool) -> None:
        """interleaved: whether outputs alternate between gates and ups."""
        super().__init__()
        self.num_experts, self.out_features = quantized.blocks.shape[:2]
        self.in_features = quantized.scales.shape[2] * 32
        self.interleaved = interleaved
        self.bias = nn.Parameter(bias, requires_grad=False)  # [E, out]
        relaid = relay(quantized, interleaved=interleaved) if quantized.blocks.is_cuda and fits(quantized) else None
        self.in_kernel_order = relaid is not None
        if relaid is not None:
            torch.cuda.empty_cache()  # of the re-layout, lest the next weights lie in its pieces and keep them
        first, second = quantized if relaid is None else relaid[:2]
        self.blocks = nn.Buffer(first)
        self.scales = nn.Buffer(second)

    def relaid(self) -> Relaid | None:
        """The weights as the kernels read them; None if they do not fit that order. On a CPU, a copy."""
        if self.in_kernel_order:
            return Relaid(self.blocks, self.scales, self.interleaved)
        quantized = Mxfp4(self.blocks, self.scales)
        return relay(quantized, interleaved=self.interleaved) if fits(quantized) else None

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        return self._some(slice(expert, expert + 1), dtype)[0]

    def stack(self, dtype: torch.dtype) -> Tensor:
        return self._some(slice(None), dtype)

    def _some(self, experts: slice, dtype: torch.dtype) -> Tensor:
        """The matrices [.., in, out] of some experts."""
        if self.in_kernel_order:
            relaid = Relaid(self.blocks, self.scales, self.interleaved)
            return dequantize_relaid(relaid, dtype, experts=experts).mT
        return dequantize(self.blocks[experts], self.scales[experts], dtype).mT


class ExpertLora(nn.Module):
    """The factored LoRA of E matrices [in, out]: A [E, r, in], drawn as PEFT does, B [E, out, r], zero."""

    def __init__(self, weight: DenseWeight | PackedWeight, *, rank: int, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        device = weight.bias.device
        self.a = nn.Parameter(torch.empty(weight.num_experts, rank, weight.in_features, dtype=dtype, device=device))
        self.b = nn.Parameter(torch.zeros(weight.num_experts, weight.out_features, rank, dtype=dtype, device=device))
        self.scale = scale

    def factors(self) -> Lora:
        return Lora(self.a, self.b, self.scale)


class Experts(nn.Module):
    """gpt-oss's experts; `forward` is what GptOssMLP calls."""

    def __init__(self, gate_up: DenseWeight | PackedWeight, down: DenseWeight | PackedWeight, *, config: Any) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.gate_up_lora: ExpertLora | None = None
        self.down_lora: ExpertLora | None = None
        self.adapter_enabled = True
        self._frozen: FrozenExperts | None = None  # the weights as training reads them, once it has
        self.fixed_shape = False  # the engine's decode on the CPU sets it, see kernels/experts.py
        # Older configs (transformers 5.17) leave the two numbers to the model's code.
        self.alpha = float(getattr(config, "swiglu_alpha", 1.702))
        self.limit = float(getattr(config, "swiglu_limit", 7.0))

    def add_lora(self, *, rank: int, scale: float, dtype: torch.dtype) -> None:
        self.gate_up_lora = ExpertLora(self.gate_up, rank=rank, scale=scale, dtype=dtype)
        self.down_lora = ExpertLora(self.down, rank=rank, scale=scale, dtype=dtype)

    def every_row(self, hidden: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """As `forward`, without gradients, by every expert on every row: no shape in it depends on the routing."""
        fixed_shape, self.fixed_shape = self.fixed_shape, True
        try:
            return self.forward(hidden, router_indices, routing_weights)
        finally:
            self.fixed_shape = fixed_shape

    @property
    def trained_by_kernels(self) -> bool:
        """Whether `trained` goes through the MXFP4 weights as they are; else it is `forward` under autograd."""
        return isinstance(self.gate_up, PackedWeight) and self.gate_up.in_kernel_order

    def trained(
        self,
        hidden: Tensor,
        indices: Tensor,
        weights: Tensor,
        *,
        tiling: Tiling = ALL_AT_ONCE,
        only_backward: bool = False,
        keep: bool = False,
    ) -> Tensor:
        """As `forward`, for training: [N, D], float32 where the weights are in the kernels' order."""
        if not self.trained_by_kernels:
            return self.forward(hidden, indices, weights)
        if self._frozen is None:
            assert isinstance(self.gate_up, PackedWeight)
            assert isinstance(self.down, PackedWeight)
            gate_up, down = self.gate_up.relaid(), self.down.relaid()
            assert gate_up is not None
            assert down is not None
            self._frozen = frozen_experts(
                gate_up,
                down,
                gate_up_bias=self.gate_up.bias,
                down_bias=self.down.bias,
                alpha=self.alpha,
                limit=self.limit,
            )
        gate_up_lora, down_lora = self._loras()
        return trained_experts(
            hidden,
            indices,
            weights,
            self._frozen,
            gate_up_lora=gate_up_lora,
            down_lora=down_lora,
            tiling=tiling,
            only_backward=only_backward,
            keep=keep,
        )

    def _loras(self) -> tuple[Lora | None, Lora | None]:
        if not self.adapter_enabled or self.gate_up_lora is None or self.down_lora is None:
            return None, None
        return self.gate_up_lora.factors(), self.down_lora.factors()

    def forward(self, hidden: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        gate_up_lora, down_lora = self._loras()
        compute = experts_fixed_shape if self.fixed_shape else experts
        return compute(
            hidden,
            router_indices,
            routing_weights,
            gate_up=self.gate_up,
            down=self.down,
            gate_up_lora=gate_up_lora,
            down_lora=down_lora,
            alpha=self.alpha,
            limit=self.limit,
        )
