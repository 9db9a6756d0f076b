"""transformers' GptOssForCausalLM with our attention and experts in it, its weights read straight from a checkpoint.

The model is built empty and each tensor put in its place as it is read, so there is never a second copy. Attention is
registered with transformers under the name `flexsink`, with a mask function that hands the padding mask on as it is.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding, GptOssTopKRouter

from stages.kernels.attention import sink_attention
from stages.model.checkpoint import Checkpoint
from stages.model.experts import DenseWeight, Experts, PackedWeight
from stages.model.mxfp4 import Mxfp4, dequantize
from stages.model.nf4 import Nf4Head, nf4_layer

ATTENTION_NAME = "flexsink"
STACKS = ("gate_up_proj", "down_proj")
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")  # float32, as transformers


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None,
    s_aux: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, H, T, C] in, [B, T, H, C] out."""
    out = sink_attention(query, key, value, s_aux, scale=scaling, window=sliding_window, key_mask=attention_mask)
    return out.transpose(1, 2).contiguous(), None


def _padding_mask(*, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """The padding mask bool [B, L] itself: causality and windows are the attention's own business."""
    return attention_mask


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _padding_mask)


class Router(GptOssTopKRouter):
    """transformers' router, its logits in float32 in every dtype: rounded to bfloat16, one token in twenty of a layer
    would go to other experts here than in the engine, whose sums are in another order.
    """

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, E], weights [N, k] and experts [N, k] of hidden [N, D]."""
        logits = F.linear(hidden_states.float(), self.weight.float(), self.bias.float())
        values, chosen = torch.topk(logits, self.top_k, dim=-1)
        return logits, values.softmax(-1), chosen


def build(
    checkpoint: Checkpoint,
    *,
    experts: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    lora_rank: int = 0,
    dense: str = "full",
    offload_embedding: bool = False,
) -> GptOssForCausalLM:
    """The checkpoint's model, as `assemble` makes it."""
    return assemble(
        checkpoint.config,
        checkpoint.tensors(),
        experts=experts,
        dtype=dtype,
        device=device,
        lora_rank=lora_rank,
        dense=dense,
        offload_embedding=offload_embedding,
    )


def assemble(
    config: Any,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    experts: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    lora_rank: int = 0,
    dense: str = "full",
    offload_embedding: bool = False,
) -> GptOssForCausalLM:
    """The model of these named tensors in eval mode; every parameter is frozen. A tensor that is on `device` and of the
    right type already is taken as it is.

    experts: "mxfp4" keeps blocks and scales, "dequantized" unpacks them to `dtype`. Dense experts stay dense in both.
    dense: "nf4" packs the attention projections and the unembedding. offload_embedding leaves the embedding on the CPU.
    Norms stay float32 in every dtype, as transformers keeps them.
    """
    config._attn_implementation = ATTENTION_NAME
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
        for layer in model.model.layers:
            layer.mlp.router = Router(config)
    model.model.rotary_emb = GptOssRotaryEmbedding(config).to(device)  # its buffers are in no checkpoint
    stacks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        layer, _, part = name.partition(".mlp.experts.")
        if not part:
            owner, _, attribute = name.rpartition(".")
            stays = offload_embedding and name == "model.embed_tokens.weight"
            value = tensor.to("cpu" if stays else device, torch.float32 if name.endswith(NORMS) else dtype)
            if dense == "nf4" and name.endswith(("_proj.weight", "lm_head.weight")):
                _set_nf4(model, owner, value)
                continue
            if name.endswith("_proj.weight") and value.is_cuda:
                value = _placed(
                    model.get_submodule(owner.rpartition(".")[0]), owner.rpartition(".")[2], value, lora_rank
                )
            setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
            continue
        parts = stacks.setdefault(layer, {})
        parts[part] = tensor.to(device) if tensor.dtype == torch.uint8 else tensor.to(device, dtype)
        if all(_complete(parts, stack) for stack in STACKS):  # at once: an unpacked layer's bytes are not kept
            weights = [_weight(parts, stack, keep=experts == "mxfp4", dtype=dtype) for stack in STACKS]
            model.get_submodule(f"{layer}.mlp").experts = Experts(*weights, config=config)
            del stacks[layer], parts
    remaining = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not remaining, f"never loaded: {remaining}"
    return model.eval()


def _set_nf4(model: GptOssForCausalLM, name: str, weight: Tensor) -> None:
    """Replaces the linear layer `name` by its NF4, made of this weight; a bias that has been read is kept."""
    if name == "lm_head":
        model.lm_head = Nf4Head(weight)
        return
    linear: Any = model.get_submodule(name)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    bias, linear.bias = linear.bias, None  # not to be moved while it is not there yet
    packed: Any = nf4_layer(linear)
    packed.bias = bias
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, packed)


def _placed(attention: nn.Module, name: str, weight: Tensor, lora_rank: int) -> Tensor:
    """A copy of a projection's weight in the matrix that the engine's step reads it from (stages/engine/step.py), which
    is made with the first one: put together later, it would leave as much memory again in pieces that nothing fits.
    """
    together = ("o_proj",) if name == "o_proj" else ("q_proj", "k_proj", "v_proj")
    modules: list[Any] = [attention.get_submodule(each) for each in together]
    sizes = [module.out_features for module in modules]
    if getattr(modules[0], "fused", None) is None:
        modules[0].fused = weight.new_zeros(sum(sizes) + lora_rank * len(sizes), weight.shape[1])
    fused: Tensor = modules[0].fused
    place = fused.split([*sizes, lora_rank * len(sizes)])[together.index(name)]
    return place.copy_(weight)


def _complete(parts: dict[str, Tensor], stack: str) -> bool:
    """Whether all of a stack's tensors have been read."""
    return f"{stack}_bias" in parts and (stack in parts or {f"{stack}_blocks", f"{stack}_scales"} <= parts.keys())


def _weight(parts: dict[str, Tensor], name: str, *, keep: bool, dtype: torch.dtype) -> DenseWeight | PackedWeight:
    bias = parts[f"{name}_bias"]
    if name in parts:
        return DenseWeight(parts[name], bias)
    quantized = Mxfp4(parts[f"{name}_blocks"], parts[f"{name}_scales"])
    if keep:
        return PackedWeight(quantized, bias, interleaved=name == STACKS[0])
    # dequantized as [E, out, in]; transformers and we multiply by [E, in, out]
    return DenseWeight(dequantize(*quantized, dtype).mT.contiguous(), bias)
