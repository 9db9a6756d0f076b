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
OVERSAMPLED, ITERATIONS = 16, 4  # of the singular values: drawn beyond the rank, and rounds


class Delta(NamedTuple):
    """A low-rank change of one matrix or of a stack of them."""

    a: Tensor  # [..., r, in]
    b: Tensor  # [..., out, r]
    scale: float

    def matrices(self, device: torch.device) -> Iterator[Tensor]:
        """float32 [out, in] on `device` of each matrix, one at a time."""
        for a, b in zip(self.a.view(-1, *self.a.shape[-2:]), self.b.view(-1, *self.b.shape[-2:]), strict=True):
            yield b.to(device, torch.float32) @ a.to(device, torch.float32) * self.scale


class Changes(NamedTuple):
    """What training has made of a checkpoint, on the CPU; by the tensors' names there, experts without a suffix."""

    deltas: dict[str, Delta]
    full_weights: dict[str, Tensor]

    @classmethod
    def of(cls, policy: Policy) -> "Changes":
        found = {}
        for index, layer in enumerate(policy.model.model.layers):
            prefix = f"model.layers.{index}"
            for target in ATTENTION_TARGETS:
                linear: Any = getattr(layer.self_attn, target)
                found[f"{prefix}.self_attn.{target}.weight"] = _delta(linear)
            for stack, name in STACKS.items():
                found[f"{prefix}.mlp.experts.{stack}"] = _delta(getattr(layer.mlp.experts, f"{name}_lora"))
        full = {name: parameter.detach().cpu() for name, parameter in policy.full_weights.parameters()}
        return cls(found, full)


def _delta(factors: Any) -> Delta:
    return Delta(factors.a.detach().cpu(), factors.b.detach().cpu(), factors.scale)


class Requantized(NamedTuple):
    """What re-quantising one stack of experts did to what training had added to it."""

    name: str
    changed_experts: int  # experts with a delta; the others keep their bytes
    delta_norm: float  # of what training added
    error_norm: float  # of what the stored weights miss of base plus delta


def write_merged(policy: Policy, checkpoint: Checkpoint, folder: Path, *, format: str) -> list[Requantized]:
    """Writes base plus adapter as a folder that transformers loads; says what re-quantising lost, stack by stack.

    format: mxfp4 keeps the bytes of every expert without a delta and re-quantises the others; fp16 and bf16 are dense.
    """
    report: list[Requantized] = []
    write_shards(_merged(Changes.of(policy), checkpoint, format, report, policy.device), folder)
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
    changes: Changes, checkpoint: Checkpoint, format: str, report: list[Requantized], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """The tensors to write, on the CPU; `device` is where they are worked out, an expert at a time."""
    dtype = FORMATS[format]
    pending: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors():
        stem = name.removesuffix("_blocks").removesuffix("_scales")
        if stem.endswith(tuple(STACKS)) and stem != name:  # half of a packed stack: wait for the other half
            pending[name] = tensor
            if not {f"{stem}_blocks", f"{stem}_scales"} <= pending.keys():
                continue
            stored = Mxfp4(pending.pop(f"{stem}_blocks"), pending.pop(f"{stem}_scales"))
            if format == "mxfp4":
                packed = _requantized(stem, stored, changes.deltas[stem].matrices(device), report)
                yield f"{stem}_blocks", packed.blocks
                yield f"{stem}_scales", packed.scales
            else:
                yield stem, _dense_stack(_experts(stored), changes.deltas[stem].matrices(device), dtype)
        elif stem.endswith(tuple(STACKS)):  # a dense stack [E, in, out]
            experts = (expert.float().mT for expert in tensor)
            if format == "mxfp4":
                added = changes.deltas[stem].matrices(device)
                quantized = [
                    quantize(base.to(delta.device) + delta) for base, delta in zip(experts, added, strict=True)
                ]
                yield f"{stem}_blocks", torch.stack([expert.blocks.cpu() for expert in quantized])
                yield f"{stem}_scales", torch.stack([expert.scales.cpu() for expert in quantized])
            else:
                yield stem, _dense_stack(experts, changes.deltas[stem].matrices(device), dtype)
        elif name in changes.deltas:
            (delta,) = changes.deltas[name].matrices(device)
            yield name, (tensor.to(device, torch.float32) + delta).to("cpu", dtype)
        elif name in changes.full_weights:
            yield name, changes.full_weights[name].to(dtype)
        else:
            yield name, tensor.to(dtype)


def _experts(stored: Mxfp4) -> Iterator[Tensor]:
    """float32 [out, in] of each expert."""
    for blocks, scales in zip(*stored, strict=True):
        yield dequantize(blocks, scales, torch.float32)


def _dense_stack(experts: Iterator[Tensor], added: Iterator[Tensor], dtype: torch.dtype) -> Tensor:
    """[E, in, out] in `dtype`, as transformers' dense layout has it."""
    return torch.stack(
        [(base.to(delta.device) + delta).mT.to("cpu", dtype) for base, delta in zip(experts, added, strict=True)]
    )


def _requantized(name: str, stored: Mxfp4, added: Iterator[Tensor], report: list[Requantized]) -> Mxfp4:
    """The stack with its changed experts quantised anew and the others' bytes untouched."""
    blocks, scales = stored.blocks.clone(), stored.scales.clone()
    changed, delta_square, error_square = 0, 0.0, 0.0
    for expert, delta in enumerate(added):
        if not delta.any():
            continue
        base = Mxfp4(stored.blocks[expert].to(delta.device), stored.scales[expert].to(delta.device))
        wanted = dequantize(*base, torch.float32) + delta
        found = quantize(wanted)
        error = dequantize(*found, torch.float32) - wanted
        blocks[expert], scales[expert] = found.blocks.cpu(), found.scales.cpu()
        delta_square += float(delta.double().square().sum())
        error_square += float(error.double().square().sum())
        changed += 1
    report.append(Requantized(name, changed, delta_square**0.5, error_square**0.5))
    return Mxfp4(blocks, scales)


def write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Writes named tensors in files of at most SHARD_BYTES (or one tensor), with an index where there are several."""
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
    if number:
        total = sum((folder / title).stat().st_size for title in titles)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: titles[part] for name, part in owners.items()},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def set_residual(changes: Changes, exported: Policy, base: Checkpoint, stored: Checkpoint) -> None:
    """Makes `exported`'s adapter the best low-rank correction towards what training made: what re-quantising swallowed.

    Each matrix's residual (base + delta - what the export stores) is cut to the adapter's rank by a truncated singular
    value decomposition (Eckart and Young 1936), found by subspace iteration (Halko et al. 2011); matrix by matrix, in
    float32. Weights trained in full, which the export rounds to 16 bits, are those of training.
    """
    room, device = dict(exported.parameters()), exported.device
    scale = exported.lora_alpha / exported.lora_rank
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # of the iteration's start
        for name, change in changes.deltas.items():
            owner = _parameter_stem(name)
            a, b = (room[f"{owner}.{factor}"].zero_() for factor in "ab")
            parts = zip(_matrices(base, name), change.matrices(device), _matrices(stored, name), strict=True)
            for index, (before, delta, after) in enumerate(parts):
                residual = before.to(device) + delta - after.to(device)
                rank = min(exported.lora_rank, *residual.shape)
                drawn = min(rank + OVERSAMPLED, *residual.shape)
                left, values, right = torch.svd_lowrank(residual, q=drawn, niter=ITERATIONS)
                root = (values[:rank] / scale).sqrt()
                a.view(-1, *a.shape[-2:])[index, :rank] = root[:, None] * right[:, :rank].mT
                b.view(-1, *b.shape[-2:])[index, :, :rank] = left[:, :rank] * root
        for name, tensor in changes.full_weights.items():
            room[name].copy_(tensor)


def _parameter_stem(name: str) -> str:
    """The adapter parameter of a checkpoint tensor: ...q_proj.weight -> ...q_proj, ...down_proj -> ...down_lora."""
    for stack, short in STACKS.items():
        if name.endswith(f"experts.{stack}"):
            return name.removesuffix(stack) + f"{short}_lora"
    return name.removesuffix(".weight")


def _matrices(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    """float32 [out, in] of each expert of a stack, or of one projection."""
    if name.endswith(".weight"):
        yield checkpoint.tensor(name).float()
    elif checkpoint.mxfp4:
        yield from _experts(Mxfp4(checkpoint.tensor(f"{name}_blocks"), checkpoint.tensor(f"{name}_scales")))
    else:
        for expert in checkpoint.tensor(name):
            yield expert.float().mT
