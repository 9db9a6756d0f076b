"""The experts of one gpt-oss layer as a module: frozen weights, dense or MXFP4, and factored LoRA beside them.

Takes the place of transformers' GptOssExperts (same call, same parameter names for dense weights) because that one can
hold neither packed weights nor factored LoRA.
"""

from typing import Any

import torch
from torch import Tensor, nn

from stages.kernels.experts import Lora, experts, experts_fixed_shape
from stages.model.mxfp4 import Mxfp4, dequantize


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
    """E matrices kept as MXFP4 [E, out, in / 32, 16], the checkpoint's own bytes."""

    packed = True
    bias: Tensor

    def __init__(self, quantized: Mxfp4, bias: Tensor) -> None:
        super().__init__()
        self.blocks = nn.Buffer(quantized.blocks)  # uint8 [E, out, in / 32, 16]
        self.scales = nn.Buffer(quantized.scales)  # uint8 [E, out, in / 32]
        self.bias = nn.Parameter(bias, requires_grad=False)  # [E, out]
        self.num_experts, self.out_features = quantized.blocks.shape[:2]
        self.in_features = quantized.scales.shape[2] * 32

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        return dequantize(self.blocks[expert], self.scales[expert], dtype).mT

    def stack(self, dtype: torch.dtype) -> Tensor:
        return dequantize(self.blocks, self.scales, dtype).mT


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
        self.fixed_shape = False  # the engine's decode on the CPU sets it, see kernels/experts.py
        # Older configs (transformers 5.17) leave the two numbers to the model's code.
        self.alpha = float(getattr(config, "swiglu_alpha", 1.702))
        self.limit = float(getattr(config, "swiglu_limit", 7.0))

    def add_lora(self, *, rank: int, scale: float, dtype: torch.dtype) -> None:
        self.gate_up_lora = ExpertLora(self.gate_up, rank=rank, scale=scale, dtype=dtype)
        self.down_lora = ExpertLora(self.down, rank=rank, scale=scale, dtype=dtype)

    def forward(self, hidden: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        use_lora = self.adapter_enabled and self.gate_up_lora is not None and self.down_lora is not None
        compute = experts_fixed_shape if self.fixed_shape else experts
        return compute(
            hidden,
            router_indices,
            routing_weights,
            gate_up=self.gate_up,
            down=self.down,
            gate_up_lora=self.gate_up_lora.factors() if use_lora and self.gate_up_lora else None,
            down_lora=self.down_lora.factors() if use_lora and self.down_lora else None,
            alpha=self.alpha,
            limit=self.limit,
        )
