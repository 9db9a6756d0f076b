"""transformers' own eager model of a synthetic policy's weights, its adapter multiplied in: an oracle.

The weights are drawn again from the seed and unpacked by the definition of MXFP4, so nothing that the policy did to its
own copy (another order of the bytes, fused matrices) is in it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from stages.model.gpt_oss import NORMS
from stages.model.lora import LoraLinear
from stages.model.mxfp4 import dequantize
from stages.model.policy import Policy
from stages.model.synthetic import random_tensors


@torch.no_grad()
def eager_twin(policy: Policy, dtype: torch.dtype, *, seed: int) -> GptOssForCausalLM:
    """Eager attention and transformers' own expert loop in `dtype`, on the policy's device; nothing of ours in it.

    seed: what the policy was made with.
    """
    config = GptOssConfig.from_dict(policy.model.config.to_dict())
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    with torch.device("meta"):
        twin = GptOssForCausalLM(config)
    twin.model.rotary_emb = GptOssRotaryEmbedding(config).to(policy.device)
    generator = torch.Generator(policy.device).manual_seed(seed)
    blocks = None
    for name, tensor in random_tensors(config, dtype=policy.dtype, generator=generator):
        if name.endswith("_blocks"):
            blocks = tensor
            continue
        if name.endswith("_scales"):
            assert blocks is not None
            name, tensor = name.removesuffix("_scales"), unpacked(blocks, tensor, dtype)
        wanted = torch.float32 if name.endswith(NORMS) else dtype
        owner, _, attribute = name.rpartition(".")
        setattr(twin.get_submodule(owner), attribute, nn.Parameter(tensor.to(wanted), requires_grad=False))
    for ours, theirs in zip(policy.model.model.layers, twin.model.layers, strict=True):
        add_adapter(ours, theirs, dtype)
    return twin.eval()


def unpacked(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, in, out] of a stack; exact."""
    num_experts, rows, num_blocks = scales.shape
    stack = torch.empty(num_experts, 32 * num_blocks, rows, dtype=dtype, device=blocks.device)
    for expert in range(num_experts):
        stack[expert] = dequantize(blocks[expert], scales[expert], torch.float32).mT
    return stack


def add_adapter(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    """Multiplies a layer's adapter out and adds it to the twin's weights."""
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        module = getattr(ours.self_attn, name)
        if isinstance(module, LoraLinear):
            weight = getattr(theirs.self_attn, name).weight
            weight += (module.b.double() @ module.a.double() * module.scale).to(dtype)
    for name in ("gate_up", "down"):
        lora, stack = getattr(ours.mlp.experts, f"{name}_lora"), getattr(theirs.mlp.experts, f"{name}_proj")
        for expert in range(stack.shape[0] if lora is not None else 0):
            stack[expert] += (lora.b[expert].double() @ lora.a[expert].double() * lora.scale).mT.to(dtype)
