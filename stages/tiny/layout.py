"""The shapes that can be made, and writing a model as a checkpoint in the layout that gpt-oss is published in.

tiny is the bundled model. mid is for a GPU: its experts have the sizes that the kernels want, multiples of 256.

Contract: `write(model, tokenizer, folder)` leaves config.json, generation_config.json, model.safetensors and the
tokenizer's files there; experts as MXFP4 `..._blocks` and `..._scales` [E, out, in / 32, 16] and [E, out, in / 32],
everything else in bfloat16.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerBase

from stages.model.files import save_tensors
from stages.model.mxfp4 import quantize

# What the published checkpoints keep in 16 bits.
NOT_QUANTIZED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
# As in gpt-oss-20b.
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_local_experts": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": 0.05,
    },
    # 57 million parameters, 50 of them in the experts.
    "mid": {
        "hidden_size": 512,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_local_experts": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "initializer_range": 0.02,
    },
}


def config(tokenizer: PreTrainedTokenizerBase, size: str = "tiny", **changes: Any) -> GptOssConfig:
    """Returns the configuration of a size: gpt-oss with smaller numbers. changes: of the size's own numbers."""
    return GptOssConfig(
        **(SIZES[size] | changes),
        vocab_size=len(tokenizer),
        num_experts_per_tok=4,
        sliding_window=128,
        max_position_embeddings=131072,
        rope_parameters=dict(ROPE),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tensors(model: GptOssForCausalLM) -> dict[str, Tensor]:
    """Returns the checkpoint's tensors by name. Rounds experts to MXFP4 and the rest to bfloat16."""
    result = {}
    for name, tensor in model.state_dict().items():
        if name.endswith((".gate_up_proj", ".down_proj")):
            packed = quantize(tensor.mT.contiguous())
            result[f"{name}_blocks"], result[f"{name}_scales"] = packed.blocks, packed.scales
        else:
            result[name] = tensor.to(torch.bfloat16).contiguous()
    return result


def write(model: GptOssForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the checkpoint into folder, which is made when missing."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(dict(sorted(tensors(model).items())), folder / "model.safetensors", metadata={"format": "pt"})
    described = model.config.to_diff_dict() | {
        "architectures": ["GptOssForCausalLM"],
        "dtype": "bfloat16",
        "layer_types": list(model.config.layer_types or ()),
        # Constants of gpt-oss; older releases of transformers 5 have no such fields.
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": list(NOT_QUANTIZED)},
    }
    stops = [tokenizer.convert_tokens_to_ids(token) for token in ("<|return|>", "<|endoftext|>", "<|call|>")]
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "do_sample": True,
        "eos_token_id": stops,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, content in (("config.json", described), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    described = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # as gpt-oss has it
    settings.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
