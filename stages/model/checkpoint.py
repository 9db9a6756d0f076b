"""Reading a gpt-oss checkpoint: from a hub id or a folder, checked before a byte of weights is used.

Format: config.json (model_type gpt_oss), safetensors files with or without an index, tokenizer files; experts either
MXFP4 (`..._blocks`, `..._scales`, as published) or dense. What is wrong is named: file, tensor, shape found and shape
needed.
"""

import errno
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stages.artifacts.run import error_number
from stages.config import UserError

HUB_FILES = ("*.json", "*.jinja", "*.safetensors", "*.model", "*.txt")
PUBLISHED = {"openai/gpt-oss-20b": 16, "openai/gpt-oss-120b": 80}  # the GB of a GPU that trains it


def locate(source: str, *, trains_here: bool = True) -> Path:
    """The folder that holds checkpoint `source`: a local folder, or a hub id fetched into the hub's cache.

    Raises UserError when it is neither, or cannot be fetched; and for a published model, which is large, where this
    process sees no GPU and is to train it (trains_here).
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1 or Path(source).parent.is_dir()
    if looks_local:
        raise UserError(
            f"no checkpoint folder {source}", "model.source is a folder or a hub id such as openai/gpt-oss-20b"
        )
    if trains_here and source in PUBLISHED and not torch.cuda.is_available():
        raise UserError(
            f"{source} needs a GPU of {PUBLISHED[source]} GB or more, and PyTorch sees none",
            "flexsink doctor looks at this machine; flexsink train tiny needs no GPU",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    there = cached(source)
    if there is not None:
        return there
    try:
        # original/ and metal/ hold the same weights in other formats.
        return Path(
            snapshot_download(source, allow_patterns=list(HUB_FILES), ignore_patterns=["original/*", "metal/*"])
        )
    except Exception as error:  # the hub raises requests', httpx's and its own errors alike
        if error_number(error) in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space there, or set HF_HOME to a folder on another disk"
            raise UserError(f"the disk is full: {HF_HUB_CACHE}", hint) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "check the id and the network, or set model.source to a folder that holds the checkpoint"
        raise UserError(f"cannot fetch {source} from the hub: {reason}", hint) from error


def cached(source: str) -> Path | None:
    """The hub's snapshot of `source` on this machine, when all of it is here: then no network is asked, which without
    one would take tens of seconds to say so."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(source, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    index = folder / "model.safetensors.index.json"
    try:
        weights = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError):
        weights = {"model.safetensors"}
    wanted = {"config.json", "tokenizer.json", *weights}
    return folder if all((folder / name).is_file() for name in wanted) else None


def read_config(folder: Path) -> Any:
    """The checkpoint's GptOssConfig; UserError when config.json is missing, broken or of another architecture."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no config.json", "model.source must be a folder that save_pretrained wrote"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}", "copy the checkpoint again") from None
    if not isinstance(raw, dict) or raw.get("model_type") != "gpt_oss":
        kind = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise UserError(f"{folder} holds a {kind} model", "flexsink trains gpt-oss only (model_type gpt_oss)")
    from transformers import GptOssConfig

    return GptOssConfig.from_dict(raw)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file that makes the checkpoint, by name."""
    result = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in {".json", ".jinja", ".safetensors"} and path.is_file():
            with path.open("rb") as file:
                result[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return result


def expected_shapes(config: Any, *, mxfp4: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of a gpt-oss checkpoint of this config, with its shape."""
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
    }
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        for name, rows, columns in (
            ("q_proj", queries, hidden),
            ("k_proj", keys, hidden),
            ("v_proj", keys, hidden),
            ("o_proj", hidden, queries),
        ):
            shapes[f"{layer}.self_attn.{name}.weight"] = (rows, columns)
            shapes[f"{layer}.self_attn.{name}.bias"] = (rows,)
        shapes[f"{layer}.self_attn.sinks"] = (config.num_attention_heads,)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.mlp.router.weight"] = (experts, hidden)
        shapes[f"{layer}.mlp.router.bias"] = (experts,)
        for name, columns, rows in (("gate_up_proj", hidden, 2 * inner), ("down_proj", inner, hidden)):
            stack = f"{layer}.mlp.experts.{name}"
            shapes[f"{stack}_bias"] = (experts, rows)
            if mxfp4:
                shapes[f"{stack}_blocks"] = (experts, rows, columns // 32, 16)
                shapes[f"{stack}_scales"] = (experts, rows, columns // 32)
            else:
                shapes[stack] = (experts, columns, rows)
    return shapes


class Checkpoint:
    """A checked checkpoint folder; tensors are read one at a time.

    Example:
        checkpoint = Checkpoint(locate("data/tiny"))
        for name, tensor in checkpoint.tensors(): ...
    """

    def __init__(self, folder: Path) -> None:
        """Checks config, names, shapes and types of all tensors. Raises UserError naming what is wrong."""
        self.folder = folder
        self.config = read_config(folder)
        self._file_of = _tensor_files(folder)
        self.mxfp4 = any(name.endswith("_blocks") for name in self._file_of)
        self._check()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, file by file. Raises UserError when the data cannot be read."""
        for path in sorted(set(self._file_of.values())):
            with _open(path) as file:
                for name in sorted(key for key, owner in self._file_of.items() if owner == path):
                    yield name, file.get_tensor(name)

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name. Raises UserError when the data cannot be read."""
        with _open(self._file_of[name]) as file:
            found: Tensor = file.get_tensor(name)
        return found

    def _check(self) -> None:
        shapes = expected_shapes(self.config, mxfp4=self.mxfp4)
        missing = sorted(shapes.keys() - self._file_of.keys())
        surplus = sorted(self._file_of.keys() - shapes.keys())
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{self.folder} lacks tensor {missing[0]}{more}", "copy or download the checkpoint again")
        if surplus:
            raise UserError(f"{self.folder} has a tensor gpt-oss lacks: {surplus[0]}", "does config.json belong to it?")
        for path in sorted(set(self._file_of.values())):
            with _open(path) as file:
                for name, owner in self._file_of.items():
                    if owner != path:
                        continue
                    tensor = file.get_slice(name)
                    if tuple(tensor.get_shape()) != shapes[name]:
                        raise UserError(
                            f"{name} in {path} is {tuple(tensor.get_shape())}, config.json says {shapes[name]}",
                            "does config.json belong to these weights?",
                        )
                    packed = name.endswith(("_blocks", "_scales"))
                    if packed != (tensor.get_dtype() == "U8"):
                        raise UserError(
                            f"{name} in {path} has type {tensor.get_dtype()}", "MXFP4 blocks and scales are U8"
                        )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}", "the file is truncated or corrupt: copy it again") from None


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{index} is not a safetensors index: {error}", "copy the checkpoint again") from None
        owners = {name: folder / file for name, file in names.items()}
        absent = sorted({path.name for path in owners.values() if not path.is_file()})
        if absent:
            raise UserError(f"{folder} lacks {absent[0]}, which its index names", "download the checkpoint again")
        return owners
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder} has no .safetensors file", "model.source must hold a checkpoint's weights")
    owners = {}
    for path in paths:
        with _open(path) as file:
            owners.update(dict.fromkeys(file.keys(), path))
    return owners


TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
