"""transformers' own eager model of the weights that a live policy holds, its adapter multiplied in: an oracle."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from stages.model.lora import LoraLinear
from stages.model.policy import Policy


@torch.no_grad()
def eager_twin(policy: Policy, dtype: torch.dtype) -> GptOssForCausalLM:
    """Eager attention and transformers' own expert loop in `dtype`, on the policy's device; nothing of ours in it."""
    config = GptOssConfig.from_dict(policy.model.config.to_dict())
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    with torch.device("meta"):
        twin = GptOssForCausalLM(config)
    twin.model.rotary_emb = GptOssRotaryEmbedding(config).to(policy.device)
    source = policy.model
    put(twin.model.embed_tokens, "weight", source.model.embed_tokens.weight, dtype)
    put(twin.lm_head, "weight", source.lm_head.weight, dtype)
    put(twin.model.norm, "weight", source.model.norm.weight, torch.float32)
    for ours, theirs in zip(source.model.layers, twin.model.layers, strict=True):
        for name in ("input_layernorm", "post_attention_layernorm"):
            put(getattr(theirs, name), "weight", getattr(ours, name).weight, torch.float32)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight, bias = linear(getattr(ours.self_attn, name))
            put(getattr(theirs.self_attn, name), "weight", weight, dtype)
            put(getattr(theirs.self_attn, name), "bias", bias, dtype)
        put(theirs.self_attn, "sinks", ours.self_attn.sinks, dtype)
        for name in ("weight", "bias"):
            put(theirs.mlp.router, name, getattr(ours.mlp.router, name), dtype)
        for name in ("gate_up", "down"):
            packed, lora = getattr(ours.mlp.experts, name), getattr(ours.mlp.experts, f"{name}_lora")
            sizes = (packed.num_experts, packed.in_features, packed.out_features)
            stack = torch.empty(sizes, dtype=dtype, device=policy.device)
            for expert in range(packed.num_experts):
                matrix = packed.matrix(expert, torch.float32).double()
                if lora is not None:
                    matrix += (lora.b[expert].double() @ lora.a[expert].double() * lora.scale).mT
                stack[expert] = matrix
            put(theirs.mlp.experts, f"{name}_proj", stack, dtype)
            put(theirs.mlp.experts, f"{name}_proj_bias", packed.bias, dtype)
    return twin.eval()


def linear(module: Any) -> tuple[Tensor, Tensor]:
    """Weight float64 [out, in] with its adapter, and bias."""
    if not isinstance(module, LoraLinear):
        return module.weight.double(), module.bias
    base: Any = module.base_layer
    return base.weight.double() + module.b.double() @ module.a.double() * module.scale, base.bias


def put(module: Any, name: str, value: Tensor, dtype: torch.dtype) -> None:
    setattr(module, name, nn.Parameter(value.detach().to(dtype), requires_grad=False))
