"""transformers + peft on the same shape, the same card, in the same run: what our update's figures are beside.

Its own settings: bf16 weights with dense experts (offline it has no MXFP4 path), gradient checkpointing, peft's LoRA on
the attention projections and, through `target_parameters`, on the experts, torch's AdamW on it, and the cross-entropy
that the model computes itself when it is given labels. One sequence a step; the experts are computed as transformers
does by default. Its attention is eager, which it takes for gpt-oss unless told otherwise, and on a card flex_attention
too, the fastest it has.

Another peer is a function `package.module:name` called as name(shape, tokens, device=, seconds=, rank=, targets=) that
yields rows as `transformers_rows` does. What a peer raises becomes the row's "error".
"""

import itertools
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from stages.bench.memory import free_memory
from stages.bench.peers import transformers_model
from stages.bench.results import error_words
from stages.bench.update_step import Stopwatch
from stages.model.lora import ATTENTION_TARGETS, EXPERT_TARGETS
from stages.model.shapes import Shape

Row = dict[str, Any]
REPEATS, SECONDS_PER_ROW = 3, 30.0
LEARNING_RATE = 5e-5


def transformers_rows(
    shape: Shape,
    tokens: Sequence[int],
    *,
    device: torch.device,
    seconds: float,
    rank: int = 16,
    targets: Sequence[str] = ("attention", "attention+experts"),
) -> Iterator[Row]:
    """Rows of each target and length, within about `seconds`; a row that has no time left says so."""
    import peft
    import transformers

    deadline = time.monotonic() + seconds
    system = f"transformers {transformers.__version__} + peft {peft.__version__}"
    attentions = ("eager", "flex_attention") if device.type == "cuda" else ("eager",)
    for target in targets:
        about = {"lora": rank, "targets": target, "dense": "full", "optimizer": "adamw"}
        about |= {"mode": "sequence", "cap_bytes": None}
        model: Any = None
        for length, attention in itertools.product(tokens, attentions):
            row: Row = {"system": f"{system}, {attention}", **about, "tokens": length}
            try:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not measured: the peers' {seconds:.0f} s were over")
                if model is None:
                    model = adapted(shape, target, rank=rank, device=device)
                model.set_attn_implementation(attention)
                experts = model.config._experts_implementation
                row["setting"] = f"bf16, {experts} experts, {attention}, checkpointing, its own cross-entropy"
                row |= measured(model, length, vocabulary=shape.vocabulary, device=device)
            except Exception as error:  # a peer's failure is a finding, not ours
                row["error"] = error_words(error)
            free_memory()  # what a traceback held is free by now
            yield row
        del model
        free_memory()


def adapted(shape: Shape, target: str, *, rank: int, device: torch.device) -> Any:
    """transformers' model with peft's adapter, ready to train."""
    from peft import LoraConfig, get_peft_model

    model = transformers_model(shape, device=device)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(ATTENTION_TARGETS),
        target_parameters=list(EXPERT_TARGETS) if target == "attention+experts" else None,
        bias="none",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions have other names for checkpointing
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return get_peft_model(model, config).train()


def measured(model: Any, length: int, *, vocabulary: int, device: torch.device) -> Row:
    """Milliseconds, tokens a second and memory of steps on one random sequence, the median after a warm-up."""
    model.zero_grad(set_to_none=True)  # of a length that failed
    free_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch._dynamo.reset()  # its limit of recompilations would drop the third length to the unfused path
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    ids = torch.randint(0, vocabulary, (1, length), device=device)
    watch = Stopwatch(device)
    found: list[dict[str, float]] = []
    started = time.monotonic()
    first = 0.0
    while len(found) < REPEATS and (not found or time.monotonic() - started < SECONDS_PER_ROW):
        watch.start()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        watch.lap("forward")
        loss.backward()
        watch.lap("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.lap("optimizer")
        del loss
        parts = watch.milliseconds()
        if first:
            found.append(parts)
        first = first or sum(parts.values()) / 1e3
    milliseconds = statistics.median(sum(parts.values()) for parts in found)
    row: Row = {"tokens_per_s": 1e3 * length / milliseconds, "ms": milliseconds, "first_s": first}
    row |= {f"{name}_ms": statistics.median(parts[name] for parts in found) for name in found[0]}
    if device.type == "cuda":
        row["peak_bytes"] = row["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        row["allocated_bytes"] = torch.cuda.max_memory_allocated(device)
    return row
