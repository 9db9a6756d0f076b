"""A trained policy's weights as a checkpoint: base plus adapter, re-quantised to MXFP4 or dense, written in shards.

Source: the published gpt-oss layout (MXFP4 experts, the rest bfloat16) and transformers' dense one. Tensors are made
and written one shard at a time, so that a merge needs the memory of one shard beside the policy.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.model.checkpoint import Checkpoint
from stages.model.files import save_tensors
from stages.model.lora import ATTENTION_TARGETS
from stages.model.mxfp4 import Mxfp4, dequantize, quantize
from stages.model.policy import Policy

SHARD_BYTES = 4 << 30
FORMATS = {"mxfp4": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}  # of what is not packed
STACKS = {"gate_up_proj": "gate_up", "down_proj": "down"}


class Delta(NamedTuple):
    """A low-rank change of one matrix or of a stack of them."""

    a: Tensor  # [..., r, in]
    b: Tensor  # [..., out, r]
    scale: float

    def matrix(self) -> Tensor:
        """float32 [..., out, in]."""
        return self.b.float() @ self.a.float() * self.scale


class Requantized(NamedTuple):
    """What re-quantising one stack of experts did to what training had added to it."""

    name: str
    changed_experts: int  # experts with a delta; the others keep their bytes
    delta_norm: float  # of what training added
    error_norm: float  # of what the stored weights miss of base plus delta


def deltas(policy: Policy) -> dict[str, Delta]:
    """The adapter's change of each tensor, by the tensor's name in a checkpoint (experts without a suffix)."""
    found = {}
    for index, layer in enumerate(policy.model.model.layers):
        prefix = f"model.layers.{index}"
        for target in ATTENTION_TARGETS:
            linear: Any = getattr(layer.self_attn, target)
            found[f"{prefix}.self_attn.{target}.weight"] = Delta(linear.a.detach(), linear.b.detach(), linear.scale)
        for stack, name in STACKS.items():
            factors: Any = getattr(layer.mlp.experts, f"{name}_lora")
            found[f"{prefix}.mlp.experts.{stack}"] = Delta(factors.a.detach(), factors.b.detach(), factors.scale)
    return found


def write_merged(policy: Policy, checkpoint: Checkpoint, folder: Path, *, format: str) -> list[Requantized]:
    """Writes base plus adapter as a folder that transformers loads; says what re-quantising lost, stack by stack.

    format: mxfp4 keeps the bytes of every expert without a delta and re-quantises the others; fp16 and bf16 are dense.
    """
    report: list[Requantized] = []
    names = _write_shards(_merged(policy, checkpoint, format, report), folder)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if len(set(names.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    raw = json.loads((checkpoint.folder / "config.json").read_text())
    raw.pop("torch_dtype", None)
    raw["dtype"] = str(FORMATS[format]).removeprefix("torch.")
    if format == "mxfp4":
        raw.setdefault("quantization_config", {"quant_method": "mxfp4", "modules_to_not_convert": list(NOT_PACKED)})
    else:
        raw.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
    copy_tokenizer(checkpoint.folder, folder)
    return report


NOT_PACKED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies what a model folder holds beside weights and config: tokenizer, template, generation defaults."""
    for path in sorted(source.iterdir()):
        is_text = path.suffix in {".json", ".jinja", ".model", ".txt"}
        if path.is_file() and is_text and path.name not in {"config.json", "model.safetensors.index.json"}:
            shutil.copyfile(path, folder / path.name)


def _merged(
    policy: Policy, checkpoint: Checkpoint, format: str, report: list[Requantized]
) -> Iterator[tuple[str, Tensor]]:
    changes, dtype = deltas(policy), FORMATS[format]
    trained = dict(policy.full_weights.parameters())
    pending: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors():
        stem = name.removesuffix("_blocks").removesuffix("_scales")
        if stem.endswith(tuple(STACKS)) and stem != name:  # half of a packed stack: wait for the other half
            pending[name] = tensor
            if not {f"{stem}_blocks", f"{stem}_scales"} <= pending.keys():
                continue
            stored = Mxfp4(pending.pop(f"{stem}_blocks"), pending.pop(f"{stem}_scales"))
            if format == "mxfp4":
                packed = _requantized(stem, stored, changes[stem], report)
                yield f"{stem}_blocks", packed.blocks
                yield f"{stem}_scales", packed.scales
            else:
                base = dequantize(*stored, torch.float32)
                yield stem, (base + changes[stem].matrix().cpu()).mT.to(dtype).contiguous()
        elif stem.endswith(tuple(STACKS)):  # a dense stack [E, in, out]
            merged = tensor.float().mT + changes[stem].matrix().cpu()
            if format == "mxfp4":
                packed = quantize(merged)
                yield f"{stem}_blocks", packed.blocks
                yield f"{stem}_scales", packed.scales
            else:
                yield stem, merged.mT.to(dtype).contiguous()
        elif name in changes:
            yield name, (tensor.float() + changes[name].matrix().cpu()).to(dtype)
        elif name in trained:
            yield name, trained[name].detach().cpu().to(dtype)
        else:
            yield name, tensor.to(dtype)


def _requantized(name: str, stored: Mxfp4, change: Delta, report: list[Requantized]) -> Mxfp4:
    """The stack with its changed experts quantised anew and the others' bytes untouched."""
    blocks, scales = stored.blocks.clone(), stored.scales.clone()
    changed, delta_square, error_square = 0, 0.0, 0.0
    for expert, delta in enumerate(change.matrix().cpu()):
        if not delta.any():
            continue
        wanted = dequantize(stored.blocks[expert], stored.scales[expert], torch.float32) + delta
        blocks[expert], scales[expert] = quantize(wanted)
        error = dequantize(blocks[expert], scales[expert], torch.float32) - wanted
        delta_square += float(delta.double().square().sum())
        error_square += float(error.double().square().sum())
        changed += 1
    report.append(Requantized(name, changed, delta_square**0.5, error_square**0.5))
    return Mxfp4(blocks, scales)


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> dict[str, str]:
    """Writes tensors in files of at most SHARD_BYTES (or one tensor); returns the file of each name."""
    owners: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    number = 0

    def flush() -> None:
        save_tensors(shard, folder / f"part-{number}.safetensors", metadata={"format": "pt"})
        owners.update(dict.fromkeys(shard, number))

    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
            shard, number = {}, number + 1
        shard[name] = tensor.contiguous()
    flush()
    titles = [f"model-{i + 1:05d}-of-{number + 1:05d}.safetensors" for i in range(number + 1)]
    titles = titles if number else ["model.safetensors"]
    for part, title in enumerate(titles):
        (folder / f"part-{part}.safetensors").rename(folder / title)
    return {name: titles[part] for name, part in owners.items()}


def set_residual(policy: Policy, exported: Policy, base: Checkpoint, stored: Checkpoint) -> None:
    """Makes `exported`'s adapter the best low-rank correction towards `policy`: what re-quantising swallowed.

    Each matrix's residual (base + delta - what the export stores) is cut to the adapter's rank by a truncated singular
    value decomposition (Eckart and Young 1936); expert by expert, in float32. Weights trained in full, which the export
    rounds to 16 bits, are those of `policy`.
    """
    changes, room = deltas(policy), dict(exported.parameters())
    before, after = dict(_dense(base)), dict(_dense(stored))
    for name, change in changes.items():
        residual = before[name] + change.matrix().cpu() - after[name]
        owner = _parameter_stem(name)
        a, b = room[f"{owner}.a"], room[f"{owner}.b"]
        scale = exported.lora_alpha / exported.lora_rank
        left, values, right = torch.linalg.svd(residual, full_matrices=False)
        rank = min(a.shape[-2], values.shape[-1])
        root = (values[..., :rank] / scale).sqrt()
        with torch.no_grad():
            a.zero_()
            b.zero_()
            a[..., :rank, :] = root.unsqueeze(-1) * right[..., :rank, :]
            b[..., :, :rank] = left[..., :, :rank] * root.unsqueeze(-2)
    with torch.no_grad():
        for name, parameter in policy.full_weights.parameters():
            room[name].copy_(parameter)


def _parameter_stem(name: str) -> str:
    """The adapter parameter of a checkpoint tensor: ...q_proj.weight -> ...q_proj, ...down_proj -> ...down_lora."""
    for stack, short in STACKS.items():
        if name.endswith(f"experts.{stack}"):
            return name.removesuffix(stack) + f"{short}_lora"
    return name.removesuffix(".weight")


def _dense(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Attention projections and expert stacks as float32 [..., out, in]."""
    pending: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors():
        stem = name.removesuffix("_blocks").removesuffix("_scales")
        if stem != name:
            pending[name] = tensor
            if {f"{stem}_blocks", f"{stem}_scales"} <= pending.keys():
                yield stem, dequantize(pending.pop(f"{stem}_blocks"), pending.pop(f"{stem}_scales"), torch.float32)
        elif name.endswith(tuple(STACKS)):
            yield name, tensor.float().mT
        elif name.endswith(tuple(f"{target}.weight" for target in ATTENTION_TARGETS)):
            yield name, tensor.float()
