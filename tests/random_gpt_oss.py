"""Random gpt-oss checkpoints for tests, and transformers' own eager model of the same weights as the oracle."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GptOssConfig, GptOssForCausalLM

from stages.model.mxfp4 import dequantize, quantize

YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def make_config(**changes: object) -> GptOssConfig:
    """The tiny model's config, with a smaller vocabulary."""
    sizes = {
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 256,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "rope_parameters": YARN,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    return GptOssConfig(**(sizes | changes))


def write_checkpoint(folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """Writes a random model as published gpt-oss checkpoints are: experts MXFP4, the rest bfloat16."""
    config = make_config(**changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    tensors = {}
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if "layernorm" in name or name.endswith("norm.weight"):
            value = 1 + 0.1 * drawn
        elif name.endswith(("bias", "sinks")):
            value = drawn * (1.0 if "sinks" in name else 0.2)
        else:
            value = drawn * (1.5 / parameter.shape[-2 if "experts" in name else -1] ** 0.5)
        if name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = (t.contiguous() for t in quantize(value.mT))
        else:
            tensors[name] = value.to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = config.to_dict() | {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    return folder


def eager_model(folder: Path, dtype: torch.dtype = torch.float32) -> GptOssForCausalLM:
    """transformers' own model with eager attention and its own expert loop, holding the checkpoint's tensors."""
    from safetensors.torch import load_file

    config = GptOssConfig.from_dict(json.loads((folder / "config.json").read_text()))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = GptOssForCausalLM(config).to(dtype)
    tensors = load_file(folder / "model.safetensors")
    state = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            state[stem] = dequantize(tensor, tensors[f"{stem}_scales"], dtype).mT
        elif not name.endswith("_scales"):
            state[name] = tensor.to(dtype)
    model.load_state_dict(state)
    return model.eval()
