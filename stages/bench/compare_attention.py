"""How far each attention path is from transformers' eager attention, layer by layer, on equal inputs.

An error in the attention of a late layer, or of one kind of layer, hides in the model's output behind everything that
follows. So each layer is given what the layer gets in transformers' own model, and so is each path:

- eager: transformers' GptOssAttention with eager attention, the measure of the others;
- plain: the differentiable PyTorch path (kernels/attention.py);
- flex: prefill by flex_attention (kernels/prefill_attention.py), on a GPU;
- decode: single tokens through the decode kernel over paged and ring caches (kernels/decode_attention.py), on a GPU or
  in Triton's interpreter, at positions around the window's edge and near the end.

Compared is what goes into the output projection. The truth is eager in float64. Weights and inputs are bf16 numbers in
every dtype, so nothing but arithmetic differs.
"""

import copy
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.config import UserError
from stages.kernels.attention import sink_attention
from stages.kernels.decode_attention import decode_attention, interpreted
from stages.kernels.prefill_attention import PackedDocs, prefill_attention

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PAGE = 128
ALLOWED = 2.0  # times eager's own error


class Layer(NamedTuple):
    """What one layer's attention is given."""

    number: int
    window: int | None
    hidden: Tensor  # [T, D] float32
    visible: Tensor  # bool [T, T], from transformers' own mask


class Row(NamedTuple):
    """One path of one layer in one dtype. Relative errors are norms of differences over the norm of what is right."""

    layer: int
    kind: str  # "sliding" or "full"
    dtype: str
    path: str
    max_from_eager: float
    relative_from_eager: float
    max_error: float  # from float64
    relative_error: float
    times_eager: float  # relative_error over that of eager, over the same queries

    @property
    def right(self) -> bool:
        """Whether it errs at most twice as much as eager, or no more than by one rounding of the result."""
        return self.times_eager <= ALLOWED or self.relative_error <= torch.finfo(DTYPES[self.dtype]).eps / 2


class Projected(NamedTuple):
    """A layer's attention inputs in one dtype, RoPE applied."""

    query: Tensor  # [T, H, C]
    key: Tensor  # [T, K, C]
    value: Tensor  # [T, K, C]


def shape_model(shape: str, num_layers: int, device: torch.device) -> Any:
    """A random model whose attention has the true sizes of `shape`; its experts and vocabulary are small."""
    from transformers import GptOssConfig, GptOssForCausalLM

    if shape not in ("gpt-oss-20b", "gpt-oss-120b"):
        raise UserError(f"no shape {shape!r}", "one of gpt-oss-20b, gpt-oss-120b")
    config = GptOssConfig(  # sizes that are not named here are gpt-oss's own defaults
        num_hidden_layers=num_layers, intermediate_size=64, num_local_experts=4, vocab_size=1024, pad_token_id=0
    )
    config._attn_implementation = "eager"
    with torch.device(device):
        torch.manual_seed(0)
        model = GptOssForCausalLM(config).float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                drawn = torch.randn(parameter.shape)
                if name.endswith("norm.weight"):
                    drawn = 1 + 0.1 * drawn
                elif name.endswith("bias"):
                    drawn = 0.2 * drawn
                elif not name.endswith("sinks"):
                    drawn = drawn * 1.5 / parameter.shape[-1] ** 0.5
                parameter.copy_(drawn.bfloat16())
    return model.eval()


def checkpoint_model(source: str, device: torch.device) -> Any:
    """A checkpoint's model in float32, its experts as they are stored, with eager attention."""
    from stages.model.checkpoint import Checkpoint, locate
    from stages.model.gpt_oss import build

    model = build(Checkpoint(locate(source)), experts="mxfp4", dtype=torch.float32, device=device)
    model.config._attn_implementation = "eager"
    return model


def capture(model: Any, ids: Tensor) -> list[Layer]:
    """Each layer's input in a pass of transformers' own model over ids [T]."""
    layers: list[Layer] = []
    handles = []
    for index, layer in enumerate(model.model.layers):

        def hook(module: Any, _: Any, arguments: dict[str, Any], index: int = index) -> None:
            hidden, mask = arguments["hidden_states"][0], arguments["attention_mask"][0, 0]
            hidden = hidden.to(torch.bfloat16).float()
            layers.append(Layer(index, module.sliding_window, hidden, mask if mask.dtype == torch.bool else mask == 0))

        handles.append(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad():
            model.model(ids[None])
    finally:
        for handle in handles:
            handle.remove()
    return layers


def eager(attention: Any, layer: Layer, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Projected]:
    """transformers' attention output [T, H * C] before the output projection, and what went into the attention."""
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

    outs: list[Tensor] = []
    handle = attention.o_proj.register_forward_pre_hook(lambda _, arguments: outs.append(arguments[0][0]))
    hidden = layer.hidden.to(dtype)[None]
    mask = torch.zeros(layer.visible.shape, dtype=dtype, device=hidden.device)
    mask = mask.masked_fill(~layer.visible, torch.finfo(dtype).min)[None, None]
    cos, sin = cos.to(dtype)[None], sin.to(dtype)[None]
    attention(hidden, (cos, sin), mask)
    handle.remove()
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    heads = (p(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections)
    query, key, value = heads
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    return outs[0], Projected(*(x[0].transpose(0, 1) for x in (query, key, value)))


def plain(attention: Any, layer: Layer, projected: Projected) -> Tensor:
    parts = [x.transpose(0, 1)[None] for x in projected]
    out = sink_attention(parts[0], parts[1], parts[2], attention.sinks, scale=attention.scaling, window=layer.window)
    return out[0].transpose(0, 1).flatten(1)


def flex(attention: Any, layer: Layer, projected: Projected) -> Tensor:
    out = prefill_attention(
        *projected,
        sinks=attention.sinks,
        scale=attention.scaling,
        window=layer.window,
        docs=PackedDocs((projected.query.shape[0],)),
    )
    return out.flatten(1)


def decode(
    attention: Any, layer: Layer, projected: Projected, cos: Tensor, sin: Tensor, positions: list[int]
) -> Tensor:
    """The decode kernel's output [len(positions), H * C]: one slot for each position, everything before it cached."""
    device, dtype = projected.key.device, projected.key.dtype
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    at = torch.tensor(positions, device=device)
    qkv = layer.hidden[at].to(dtype) @ torch.cat([linear.weight for linear in linears]).mT
    slots, (_, kv_heads, channels) = len(positions), projected.key.shape
    pages = 1 if layer.window else -(-projected.key.shape[0] // PAGE)
    places = slots if layer.window else slots * pages
    keys, values = (
        torch.zeros(places, kv_heads, layer.window or PAGE, channels, dtype=dtype, device=device) for _ in range(2)
    )
    table = torch.arange(places, dtype=torch.int32, device=device).view(slots, pages)
    for slot, position in enumerate(positions):
        seen = torch.arange(max(0, position - layer.window) if layer.window else 0, position, device=device)
        where = torch.full_like(seen, slot) if layer.window else table[slot, seen // PAGE].long()
        keys[where, :, seen % keys.shape[2]] = projected.key[seen]
        values[where, :, seen % keys.shape[2]] = projected.value[seen]
    return decode_attention(
        qkv,
        sinks=attention.sinks,
        cos=cos,
        sin=sin,
        keys=keys,
        values=values,
        rows=torch.arange(slots, dtype=torch.int32, device=device),
        positions=at.to(torch.int32),
        page_table=None if layer.window else table,
        scale=attention.scaling,
        bias=torch.cat([linear.bias for linear in linears]),
    )


def compare(model: Any, ids: Tensor, dtypes: list[str]) -> Iterator[Row]:
    """Yields a row for each layer, dtype and path that this machine has."""
    device = ids.device
    cos, sin = (x[0].float() for x in model.model.rotary_emb(torch.zeros(1, device=device), _positions(ids)))
    edges = [p for p in (0, 126, 127, 128, 129, 255, len(ids) // 2, len(ids) - 2, len(ids) - 1) if p < len(ids)]
    positions = sorted(set(edges))
    everything = list(range(len(ids)))
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    for layer in capture(model, ids):
        module = copy.deepcopy(model.model.layers[layer.number].self_attn)
        module.config = config
        truth, _ = eager(module.double(), layer, cos, sin, torch.float64)
        for name in dtypes:
            dtype = DTYPES[name]
            attention = module.to(dtype)
            right, projected = eager(attention, layer, cos, sin, dtype)
            outs: dict[str, tuple[Tensor, list[int]]] = {"plain": (plain(attention, layer, projected), everything)}
            if device.type == "cuda":
                outs["flex"] = flex(attention, layer, projected), everything
            if device.type == "cuda" or interpreted():
                outs["decode"] = decode(attention, layer, projected, cos, sin, positions), positions
            kind = "sliding" if layer.window else "full"
            yield _row(layer.number, kind, name, "eager", right, right, truth)
            for path, (out, at) in outs.items():
                yield _row(layer.number, kind, name, path, out, right[at], truth[at])
            module = copy.deepcopy(model.model.layers[layer.number].self_attn)
            module.config = config


def absent(device: torch.device) -> dict[str, str]:
    """The paths that this machine lacks, and why."""
    if device.type == "cuda":
        return {}
    missing = {"flex": "no GPU (on a CPU, compiled flex_attention returns no log-sum-exp)"}
    return missing if interpreted() else missing | {"decode": "no GPU (TRITON_INTERPRET=1 runs it slowly on a CPU)"}


def run(
    source: str, *, shape: str | None, num_layers: int, num_tokens: int, dtypes: list[str], note: Callable[[str], None]
) -> dict[str, Any]:
    """Compares and returns {"rows", "absent", ...}; `shape` takes the place of the checkpoint `source`."""
    for name in dtypes:
        if name not in DTYPES:
            raise UserError(f"no dtype {name!r}", f"some of {', '.join(DTYPES)}, with commas between them")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not 2 <= num_tokens <= 131072:
        raise UserError(f"--tokens is {num_tokens}", "2 to 131072; more than 128 to see the window")
    note("building the model")
    model = shape_model(shape, num_layers, device) if shape else checkpoint_model(source, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (num_tokens,), generator=generator).to(device)
    rows = []
    with torch.no_grad():
        for row in compare(model, ids, dtypes):
            rows.append(row)
            note(f"layer {row.layer} {row.dtype} {row.path}")
    import transformers

    return {
        "what": "attention paths against transformers eager and float64, layer by layer on equal inputs",
        "model": f"{shape}, random weights" if shape else source,
        "tokens": num_tokens,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "absent": absent(device),
        "right": all(row.right for row in rows),
        "rows": [row._asdict() | {"right": row.right} for row in rows],
    }


def print_table(result: dict[str, Any]) -> None:
    """Prints the rows as a table, and which paths are absent."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['model']}, {result['tokens']} tokens, {result['device']}")
    for name in ("layer", "kind", "dtype", "path"):
        table.add_column(name)
    for name in ("from eager: max", "relative", "from float64: max", "relative", "x eager's", ""):
        table.add_column(name, justify="right")
    previous = None
    for row in result["rows"]:
        if previous is not None and previous != row["layer"]:
            table.add_section()
        previous = row["layer"]
        figures = [f"{row[k]:.1e}" for k in ("max_from_eager", "relative_from_eager", "max_error", "relative_error")]
        table.add_row(
            str(row["layer"]), row["kind"], row["dtype"], row["path"], *figures, f"{row['times_eager']:.2f}",
            "" if row["right"] else "WRONG",
        )  # fmt: skip
    console = Console(highlight=False)
    console.print(table)
    for path, why in result["absent"].items():
        console.print(f"{path}: absent, {why}")
    if result["right"]:
        console.print(f"every path errs at most {ALLOWED:g} times as much as transformers eager does")
    else:
        wrong = sorted({f"{row['path']} in layer {row['layer']}" for row in result["rows"] if not row["right"]})
        console.print(f"errs more than {ALLOWED:g} times as much as transformers eager: {', '.join(wrong)}")


def write(path: Path, result: dict[str, Any], command: str) -> None:
    """Writes the result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, **result}, indent=1) + "\n")


def _positions(ids: Tensor) -> Tensor:
    return torch.arange(len(ids), device=ids.device)[None]


def _row(layer: int, kind: str, dtype: str, path: str, out: Tensor, right: Tensor, truth: Tensor) -> Row:
    out, right = out.double(), right.double()

    def relative(first: Tensor, second: Tensor) -> float:
        return float((first - second).norm() / second.norm())

    error = relative(out, truth)
    return Row(
        layer,
        kind,
        dtype,
        path,
        float((out - right).abs().max()),
        relative(out, right),
        float((out - truth).abs().max()),
        error,
        error / max(relative(right, truth), 1e-30),
    )
