"""The first layers of a checkpoint as one of its own, for what cannot hold all of them."""

import json
import re
import shutil
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from stages.memory import available_bytes
from stages.model.checkpoint import expected_shapes
from stages.model.files import save_tensors

MEMORY_SHARE = 0.8  # of what is free, what a model may take
LAYER = re.compile(r"\.layers\.(\d+)\.")


def layers_in_memory(config: Any, *, itemsize: int) -> int:
    """How many of the model's layers, its embeddings beside them, the host can hold, dense, in numbers of `itemsize`
    bytes; 0 when not even one.
    """
    shapes = expected_shapes(config, mxfp4=False)
    layer = sum(prod(shape) for name, shape in shapes.items() if ".layers.0." in name)
    rest = sum(prod(shape) for name, shape in shapes.items() if ".layers." not in name)
    numbers = MEMORY_SHARE * available_bytes() / itemsize
    return max(0, min(int((numbers - rest) / layer), config.num_hidden_layers))


def excerpt(source: Path, layers: int, folder: Path) -> Path:
    """Writes the first layers of a model, or of an adapter, into a new folder, which is returned."""
    folder.mkdir()
    for path in sorted(source.iterdir()):
        if path.name in {"adapter_config.json", "generation_config.json"}:
            shutil.copyfile(path, folder / path.name)
    kept: dict[str, Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            kept |= {name: file.get_tensor(name) for name in file.keys() if _layer_of(name) < layers}  # noqa: SIM118
    is_adapter = (source / "adapter_config.json").exists()
    name = "adapter_model.safetensors" if is_adapter else "model.safetensors"
    save_tensors(kept, folder / name, metadata={"format": "pt"})
    if not is_adapter:
        raw = json.loads((source / "config.json").read_text())
        raw["num_hidden_layers"] = layers
        if "layer_types" in raw:
            raw["layer_types"] = raw["layer_types"][:layers]
        (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
    return folder


def _layer_of(name: str) -> int:
    """-1 for what belongs to no layer."""
    found = LAYER.search(name)
    return int(found[1]) if found else -1
