"""Other systems on the same shape, the same card, in the same run: what our figures are beside.

transformers: bf16 experts (offline it has no MXFP4 path), random weights, its own `generate` over a cache that is
filled with random keys and values, so no prefill is waited for. Two settings: as it comes (generate switches the
experts to `batched_mm`), and its best (`grouped_mm` under another name, which generate leaves alone), over its dynamic
and its static cache, nothing compiled. Attention is eager, the default: it refuses sdpa for gpt-oss.

Another peer is a function `package.module:name` called as name(shape, cases, device=, seconds=) that yields rows as
`transformers_rows` does. What a peer raises becomes the row's "error".
"""

import gc
import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stages.bench.cases import Case
from stages.bench.results import error_words
from stages.config import UserError
from stages.model.mxfp4 import dequantize
from stages.model.shapes import Shape
from stages.model.synthetic import random_tensors

Row = dict[str, Any]
Peer = Callable[..., Iterator[Row]]
BEST_EXPERTS = "flexsink_grouped_mm"
MAX_STEPS, LEAST_STEPS, SECONDS_PER_ROW = 24, 4, 4.0


def peer(name: str, *, transformers: Peer | None = None) -> Peer:
    """The peer of this name; UserError when there is none. transformers: what that name means, `transformers_rows`
    unless another benchmark says otherwise.
    """
    if name == "transformers":
        return transformers or transformers_rows
    module, separator, function = name.partition(":")
    if not separator:
        raise UserError(f"no peer {name!r}", "transformers, none, or package.module:function")
    try:
        found: Peer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"no peer {name}: {error}", "package.module:function, importable here") from None
    return found


def transformers_rows(shape: Shape, cases: Sequence[Case], *, device: torch.device, seconds: float) -> Iterator[Row]:
    """Rows of transformers in its settings, within about `seconds`; a row that has no time left says so."""
    import transformers

    deadline = time.monotonic() + seconds
    system = f"transformers {transformers.__version__} bf16"
    model = transformers_model(shape, device=device)
    default = model.config._experts_implementation
    settings = (("default", default, False), ("grouped_mm", BEST_EXPERTS, False), ("grouped_mm", BEST_EXPERTS, True))
    for case in cases:
        for words, experts, static in settings:
            about = {"system": f"{system}, {words}, {'static' if static else 'dynamic'} cache"}
            row = about | {"batch": case.rows, "context": case.context, "lora": 0}
            if time.monotonic() > deadline:
                yield row | {"error": f"not measured: the peers' {seconds:.0f} s were over"}
                continue
            try:
                model.set_experts_implementation(experts)
                yield row | measured(model, case, static=static)
            except Exception as error:  # a peer's failure is a finding, not ours
                yield row | {"error": error_words(error)}
            finally:
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def transformers_model(
    shape: Shape,
    *,
    device: torch.device,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    unpacked: bool = False,
    scaled_init: bool = False,
) -> Any:
    """transformers' own model of this shape, nothing of ours in it: random weights made on the device.

    unpacked: the weights of the synthetic policy of that seed, its experts as `dtype`; without its adapter.
    scaled_init: as in random_tensors.
    """
    from transformers import GptOssForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    ALL_EXPERTS_FUNCTIONS.register(BEST_EXPERTS, ALL_EXPERTS_FUNCTIONS["grouped_mm"])
    config = shape.config()
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    model.model.rotary_emb = GptOssRotaryEmbedding(config).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    drawn = random_tensors(config, dtype=dtype, generator=generator, mxfp4=unpacked, scaled_init=scaled_init)
    for name, tensor in dense_experts(drawn, dtype) if unpacked else drawn:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(tensor, requires_grad=False))
    return model.eval()


def dense_experts(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The same tensors with every stack of blocks and scales unpacked to [E, in, out]."""
    blocks: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name.endswith("_blocks"):
            blocks[name.removesuffix("_blocks")] = tensor
        elif name.endswith("_scales"):
            stack = name.removesuffix("_scales")
            yield stack, dequantize(blocks.pop(stack), tensor, dtype).mT.contiguous()
        else:
            yield name, tensor


def filled_cache(model: Any, case: Case, *, room: int, static: bool) -> Any:
    """A cache that holds `context` random tokens for each row, and has room for more."""
    from transformers import DynamicCache, StaticCache

    config, weight = model.config, model.lm_head.weight
    kinds = {"config": config, "max_cache_len": case.context + room}
    cache: Any = StaticCache(**kinds) if static else DynamicCache(config=config)
    sizes = (case.rows, config.num_key_value_heads, case.context, config.head_dim)
    for layer in cache.layers:
        layer.update(*(torch.randn(sizes, dtype=weight.dtype, device=weight.device) for _ in range(2)))
    return cache


@torch.no_grad()
def measured(model: Any, case: Case, *, static: bool) -> Row:
    """ms_per_step, tokens_per_s and memory of transformers' `generate` on this case, sampling on."""
    from transformers import LogitsProcessorList

    device = model.lm_head.weight.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    cache = filled_cache(model, case, room=MAX_STEPS + 2, static=static)
    ids = torch.randint(0, model.config.vocab_size, (case.rows, case.context + 1), device=device)
    stamps = Stamps(device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        do_sample=True,
        max_new_tokens=MAX_STEPS,
        eos_token_id=None,
        disable_compile=True,
        logits_processor=LogitsProcessorList([stamps]),
        stopping_criteria=[stamps.enough],
    )
    steps = [after - before for before, after in zip(stamps.times[1:], stamps.times[2:], strict=False)]
    seconds = statistics.median(steps)
    row = {"tokens_per_s": case.rows / seconds, "ms_per_step": 1e3 * seconds, "steps": len(steps)}
    if device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_reserved(device)
    return row


class Stamps:
    """When each step's logits were there; also ends a generation that has taken long enough."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        return scores

    def enough(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        over = len(self.times) > LEAST_STEPS and self.times[-1] - self.times[0] > SECONDS_PER_ROW
        return torch.full((input_ids.shape[0],), over, device=input_ids.device, dtype=torch.bool)
