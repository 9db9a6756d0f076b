"""LoRA on attention and experts, and its files in PEFT's layout so that PEFT loads what we write.

Source: Hu et al. 2021, "LoRA"; the key layout is that of peft 0.21 for `target_modules` (linear layers) and
`target_parameters` (stacked experts: A [r * E, in] expert-major, B [out, r * E] expert-minor; the gate_up wrapper lies
under the down wrapper's `base_layer`, because PEFT wraps one parameter of a module after the other). Weights trained in
full (full_weights.py) lie beside them under their own names: routers are `modules_to_save`; for sinks PEFT has no
word, it loads them over the model's own and does not take them back in `disable_adapter`.

Does not cover dropout, rank patterns, or DoRA.
"""

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import UserError
from stages.kernels.trained_linear import Projection
from stages.model.experts import ExpertLora, Experts
from stages.model.files import save_tensors
from stages.model.nf4 import dense_weight

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_TARGETS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


class LoraLinear(nn.Module):
    """base(x) + scale * B A x, with the base layer frozen and whatever it is (dense or NF4)."""

    def __init__(
        self, base: nn.Module, *, in_features: int, out_features: int, rank: int, scale: float, dtype: torch.dtype
    ):
        super().__init__()
        device = next(base.parameters()).device
        self.base_layer = base
        self.a = nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=device))
        self.b = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=device))
        self.scale = scale
        self.adapter_enabled = True

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.base_layer(hidden)
        if not self.adapter_enabled:
            return out
        inner = F.linear(hidden, self.a.to(hidden.dtype)).flatten(0, -2)
        out.flatten(0, -2).addmm_(inner, self.b.mT.to(hidden.dtype), alpha=self.scale)
        return out


def projection(layer: nn.Module) -> Projection:
    """A linear layer of the model, with LoRA or without, as the trainer takes it."""
    base = layer.base_layer if isinstance(layer, LoraLinear) else layer
    a, b, scale = None, None, 0.0
    if isinstance(layer, LoraLinear) and layer.adapter_enabled:
        a, b, scale = layer.a, layer.b, layer.scale
    bias = cast("Tensor | None", base.bias)
    return Projection(cast("int", base.out_features), functools.partial(dense_weight, base), bias, a, b, scale)


def add_lora(model: nn.Module, *, rank: int, alpha: float, dtype: torch.dtype, seed: int) -> None:
    """Puts LoRA of `rank` on every attention projection and every expert of `model`; all other parameters are frozen.

    A is drawn from Kaiming's uniform distribution as PEFT does, by `seed` alone; B is zero, so nothing changes yet.
    Rank 0: no LoRA at all.
    """
    model.requires_grad_(False)
    if rank == 0:
        return
    scale = alpha / rank
    for layer in model.model.layers:  # type: ignore[union-attr]
        for target in ATTENTION_TARGETS:
            base = getattr(layer.self_attn, target)
            sizes = {"in_features": base.in_features, "out_features": base.out_features}
            setattr(layer.self_attn, target, LoraLinear(base, **sizes, rank=rank, scale=scale, dtype=dtype))
        layer.mlp.experts.add_lora(rank=rank, scale=scale, dtype=dtype)
    reset_lora(model, seed=seed)


def reset_lora(model: nn.Module, *, seed: int) -> None:
    """The adapter as `add_lora` made it: A drawn again from `seed`, B zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora_parameters(model):
            if name.endswith(".a"):
                bound = 1 / math.sqrt(parameter.shape[-1])  # kaiming_uniform_ with a = sqrt(5)
                drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(drawn)
            else:
                parameter.zero_()


def lora_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of the adapter, in the model's order."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear | ExpertLora):
            found += [(f"{name}.a", module.a), (f"{name}.b", module.b)]
    return found


@contextlib.contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """The model without its adapter: the reference policy of the KL term, at no cost in memory."""
    carriers = [module for module in model.modules() if isinstance(module, LoraLinear | Experts)]
    for module in carriers:
        module.adapter_enabled = False
    try:
        yield
    finally:
        for module in carriers:
            module.adapter_enabled = True


def peft_name(name: str) -> str:
    """The key in adapter_model.safetensors of a parameter of ours.

    Example:
        model.layers.0.self_attn.q_proj.a    -> base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
        model.layers.0.mlp.experts.gate_up_lora.b ->
        base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight model.layers.0.mlp.experts.down_lora.b ->
        base_model.model.model.layers.0.mlp.experts.lora_B.weight
        model.layers.0.self_attn.sinks       -> base_model.model.model.layers.0.self_attn.sinks
    """
    stem, factor = name.rsplit(".", 1)
    if factor not in ("a", "b"):
        return f"base_model.model.{name}"
    stem = stem.replace(".experts.gate_up_lora", ".experts.base_layer").replace(".experts.down_lora", ".experts")
    return f"base_model.model.{stem}.lora_{factor.upper()}.weight"


def to_peft(name: str, tensor: Tensor) -> Tensor:
    """A parameter of ours as PEFT stores it; expert factors [E, ..] are flattened, all others are the same."""
    if tensor.dim() != 3:
        return tensor
    return tensor.flatten(0, 1) if name.endswith(".a") else tensor.permute(1, 2, 0).flatten(1)


def from_peft(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_peft`, for a parameter of the shape of `like`."""
    if like.dim() != 3:
        return tensor
    if name.endswith(".a"):
        return tensor.reshape(like.shape)
    num_experts, out_features, rank = like.shape
    return tensor.reshape(out_features, rank, num_experts).permute(2, 0, 1)


def save_adapter(
    parameters: Sequence[tuple[str, nn.Parameter]], folder: Path, *, rank: int, alpha: float, base: str
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, which PEFT's `PeftModel.from_pretrained` loads.

    parameters: all that trains, with our names.
    """
    tensors = {peft_name(name): to_peft(name, parameter.detach()).contiguous().cpu() for name, parameter in parameters}
    save_tensors(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": list(ATTENTION_TARGETS),
        "target_parameters": list(EXPERT_TARGETS),
    }
    if any(name.endswith(".router.weight") for name, _ in parameters):
        config["modules_to_save"] = ["router"]
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(parameters: Sequence[tuple[str, nn.Parameter]], folder: Path) -> None:
    """Reads an adapter written by `save_adapter` (or by PEFT, with the same targets) into these parameters.

    Raises UserError naming the first tensor that is missing, too many or of another shape.
    """
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in parameters:
            key = peft_name(name)
            if key not in tensors:
                raise UserError(
                    f"the adapter in {folder} has no tensor {key}",
                    "was it trained with the same targets and the same update.also_train?",
                )
            expected = to_peft(name, parameter.detach()).shape
            found = tensors.pop(key)
            if found.shape != expected:
                shapes = f"{tuple(found.shape)}, the model needs {tuple(expected)}"
                raise UserError(f"{key} in {folder} is {shapes}", "update.lora_rank must be the adapter's own")
            parameter.copy_(from_peft(name, found, parameter))
    if tensors:
        raise UserError(
            f"the adapter in {folder} has a tensor the model lacks: {min(tensors)}",
            "is it of another model, or trained with another update.also_train?",
        )
