"""Warm start of the bundled model, and of a larger one on a GPU: supervised steps on programs that the grammars write.

In fp32; on a GPU products are in TF32, all experts work on every token (few large products instead of many small ones),
and processes of their own write and tokenise the programs ahead.

Contract: `train(...)` returns a GptOssForCausalLM in fp32 whose expert weights are exactly representable in MXFP4 and
whose other weights in bfloat16: the last steps are taken with experts rounded to the MXFP4 grid. The same settings and
seed on the same kind of machine give the same model. The loss is on completions only, plus a small balance term on the
routers.

All rows of a step share one prompt, so the model sees [prompt | row 0 | row 1 | ...] as one line of tokens and its
attention, registered with transformers as `shared_prompt`, lets each row see the prompt and itself: no padding outside
of attention, the prompt computed once.

Shapes: B rows, P prompt tokens, L the longest row, S keys, N = P + all rows' tokens, H query heads, K key/value heads,
C head channels, E experts.
"""

import ctypes
import dataclasses
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from stages.kernels.experts import swiglu
from stages.model.mxfp4 import dequantize, quantize
from stages.tiny import corpus

ATTENTION = "shared_prompt"
EXPERTS = "every_expert"
FIRST = 10  # steps that do not count when the speed is measured
Batch = list[tuple[list[int], list[list[int]]]]  # a step's (prompt, rows) per task


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = 1100  # optimizer steps
    game_rows: int = 24  # completions per step
    matmul_rows: int = 8  # completions per step
    learning_rate: float = 4e-3  # peak; warm-up, then cosine to zero
    warmup_steps: int = 50
    grid_steps: int = 300  # the last steps, taken with experts rounded to MXFP4
    weight_decay: float = 0.02  # of matrices
    max_grad_norm: float = 1.0
    balance: float = 0.01  # weight of the routers' balance term
    # Where sinks start, on the scale of attention scores. From (0.5, 2.5) they stayed so small beside the scores that
    # zeroing them all changed no greedy token.
    sinks: tuple[float, float] = (4.0, 7.0)
    seed: int = 0
    device: str = "cpu"
    writers: int = 0  # processes that write batches ahead; 0 writes them between steps
    seconds: float = 0.0  # the steps are made as few as fit, going by the first ones; 0 takes them all


SETTINGS = {
    "tiny": Settings(),
    # The rate falls as the width grows; rows are what keeps a GPU busy.
    "mid": Settings(
        steps=1600, game_rows=72, matmul_rows=24, learning_rate=1e-3, warmup_steps=100, device="cuda", writers=3
    ),
}


class Layout(NamedTuple):
    """Where the rows of a packed line lie.

    Example:
        Layout(prompt=2, places=[[2, 3, 4], [5, 6, 5]], real=[[1, 1, 1], [1, 1, 0]])   # rows of 3 and 2 tokens
    """

    prompt: int  # P
    places: Tensor  # int64 [B, L], position in the line; padding repeats the row's first token
    real: Tensor  # bool [B, L]

    def to(self, device: torch.device) -> "Layout":
        return Layout(self.prompt, self.places.to(device), self.real.to(device))


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None,
    s_aux: Tensor,
    layout: Layout,
    **_: object,
) -> tuple[Tensor, None]:
    """Returns [1, N, H, C] from query [1, H, N, C], key and value [1, K, N, C]: a row sees the prompt and itself."""
    prompt, places, real = layout
    rows, longest = places.shape
    prompt_at = torch.arange(prompt, device=query.device)
    row_at = prompt + torch.arange(longest, device=query.device)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    query_p, key_p, value_p = (part[:, :, :prompt] for part in (query, key, value))  # [1, H, P, C]
    query_r, key_r, value_r = (part[0, :, places].transpose(0, 1) for part in (query, key, value))  # [B, H, L, C]
    key_r = torch.cat((key_p.expand(rows, -1, -1, -1), key_r), 2)
    value_r = torch.cat((value_p.expand(rows, -1, -1, -1), value_r), 2)
    out_p = attend(query_p, key_p, value_p, s_aux / scaling, visible(prompt_at, prompt_at, sliding_window), scaling)
    every_at = torch.cat((prompt_at, row_at))
    out_r = attend(query_r, key_r, value_r, s_aux / scaling, visible(row_at, every_at, sliding_window), scaling)
    return torch.cat((out_p[0].transpose(0, 1), out_r.transpose(1, 2)[real])).unsqueeze(0), None


def visible(query_at: Tensor, key_at: Tensor, window: int | None) -> Tensor:
    """Returns bool [L, S + 1]: which keys a query sees, always the sink in front; a window counts the query itself."""
    distance = query_at[:, None] - key_at[None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return torch.cat((torch.ones(len(query_at), 1, dtype=torch.bool, device=seen.device), seen), 1)


def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Returns [B, H, L, C], attention with a sink as one more key.

    One more channel makes torch's own attention do it: 1 in every query, the sink [H] over `scaling` in the sink's key,
    0 in the others; the sink's value is zero. Channels are filled up to a multiple of 8.
    """
    batch, heads, _, channels = query.shape
    extra = 8 - channels % 8
    query = torch.cat((query, query.new_ones(*query.shape[:3], 1), query.new_zeros(*query.shape[:3], extra - 1)), -1)
    sink = functional.pad(sinks.view(1, heads, 1, 1), (channels, extra - 1)).expand(batch, -1, -1, -1)
    key = torch.cat((sink, functional.pad(key, (0, extra))), 2)
    value = functional.pad(value, (0, extra, 1, 0))
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[None, None], scale=scaling)
    return out[..., :channels]


def no_mask(**_: object) -> None:
    """The layout says it all."""


def every_expert(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Returns the experts' output [N, D] of hidden [N, D]: every expert works on every token, weighted 0 if not chosen.

    chosen int64 [N, k], weights [N, k]. Two matrix products, the second of which also sums over the experts.
    """
    tokens, width = hidden.shape
    experts = module.gate_up_proj.shape[0]
    gate_up = torch.addmm(
        module.gate_up_proj_bias.flatten(), hidden, module.gate_up_proj.transpose(0, 1).reshape(width, -1)
    )
    inner = swiglu(gate_up.view(tokens, experts, -1), alpha=float(module.alpha), limit=float(module.limit))
    share = hidden.new_zeros(tokens, experts).scatter(1, chosen, weights)
    inner = (inner * share[..., None]).flatten(1)
    return torch.addmm(share @ module.down_proj_bias, inner, module.down_proj.flatten(0, 1))


def register() -> None:
    """Makes `shared_prompt` attention and `every_expert` experts implementations that transformers knows."""
    AttentionInterface.register(ATTENTION, shared_prompt_attention)
    AttentionMaskInterface.register(ATTENTION, no_mask)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, every_expert)


def pack(rows: list[list[int]], prompt: int) -> Layout:
    """Returns the layout of rows laid one after another behind prompt tokens."""
    longest = max(map(len, rows))
    starts = [prompt + sum(map(len, rows[:row])) for row in range(len(rows))]
    places = torch.tensor(
        [[start + (t if t < len(row) else 0) for t in range(longest)] for start, row in zip(starts, rows, strict=True)]
    )
    real = torch.tensor([[t < len(row) for t in range(longest)] for row in rows])
    return Layout(prompt, places, real)


def rows_loss(model: GptOssForCausalLM, prompt: list[int], rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Returns the rows' negative log-likelihood given the prompt, summed over tokens, and the routers' balance term."""
    device = model.lm_head.weight.device
    layout = pack(rows, len(prompt))
    line = torch.tensor([prompt + [token for row in rows for token in row]]).to(device)
    at = torch.cat((torch.arange(len(prompt)), *(len(prompt) + torch.arange(len(row)) for row in rows)))[None]
    output = model.model(
        line,
        position_ids=at.to(device),
        attention_mask=None,
        use_cache=False,
        output_router_logits=True,
        layout=layout.to(device),
    )
    # The last prompt token says each row's first one; the others are said by the token before.
    before = [
        [len(prompt) - 1, *index[: len(row) - 1]] for index, row in zip(layout.places.tolist(), rows, strict=True)
    ]
    speakers = torch.tensor([position for row in before for position in row]).to(device)
    logits = model.lm_head(output.last_hidden_state[0, speakers])
    loss = functional.cross_entropy(logits, line[0, len(prompt) :], reduction="sum")
    balance = torch.stack(
        [balance_of(logits, model.config.num_experts_per_tok) for logits in output.router_logits]
    ).mean()
    return loss, balance


def balance_of(router_logits: Tensor, top: int) -> Tensor:
    """Returns Switch's balance term (arXiv 2101.03961, eq. 4): 1 when experts share evenly, more when not."""
    experts = router_logits.shape[-1]
    chosen = functional.one_hot(router_logits.topk(top).indices, experts).sum(1).float().mean(0) / top
    return experts * (chosen * router_logits.softmax(-1).mean(0)).sum()


class OnGrid(nn.Module):
    """A parametrization that rounds [E, in, out] to MXFP4 and lets gradients through as if it had not."""

    def forward(self, weight: Tensor) -> Tensor:
        rounded = dequantize(*quantize(weight.detach().mT.contiguous()), torch.float32).mT
        return weight + (rounded - weight.detach())


def new_model(config: GptOssConfig, *, sinks: tuple[float, float]) -> GptOssForCausalLM:
    """Returns an untrained model whose sinks are drawn from a range."""
    config._attn_implementation = ATTENTION
    model = GptOssForCausalLM(config)
    for layer in model.model.layers:
        nn.init.uniform_(layer.self_attn.sinks, *sinks)
    return model


def batches(tokenizer: PreTrainedTokenizerBase, settings: Settings, writer: int = 0) -> Iterator[Batch]:
    """Yields a step's (prompt, rows) per task, for ever; other ones for each writer."""
    rng = random.Random(f"{settings.seed} {writer}" if writer else settings.seed)
    kinds: tuple[tuple[int, Callable[[random.Random], str], Callable[[random.Random], str]], ...] = (
        (settings.game_rows, corpus.game_prompt, corpus.game_completion),
        (settings.matmul_rows, lambda _: corpus.MATMUL_PROMPT, corpus.matmul_completion),
    )
    while True:
        yield [
            (corpus.render(tokenizer, prompt(rng)), tokenizer([write(rng) for _ in range(count)]).input_ids)
            for count, prompt, write in kinds
        ]


class Written(IterableDataset[Batch]):
    """The batches as PyTorch's loader wants them: each of its processes is a writer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
        self.tokenizer, self.settings = tokenizer, settings

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        return batches(self.tokenizer, self.settings, worker.id if worker else 0)


def as_it_is(batch: Batch) -> Batch:
    """A loader's own way of handing a batch on would look at every token."""
    return batch


def source_of(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Iterator[Batch]:
    """Returns the steps' batches, in the same order every time, by `settings.writers` processes or by this one."""
    if not settings.writers:
        return batches(tokenizer, settings)
    # Forked children of a process that uses a GPU or threads may hang.
    loader = DataLoader(
        Written(tokenizer, settings),
        batch_size=None,
        num_workers=min(settings.writers, os.cpu_count() or 1),
        prefetch_factor=8,
        multiprocessing_context="spawn",
        collate_fn=as_it_is,
    )
    return iter(loader)


def fitting(steps: int, *, done: int, step_s: float, left_s: float, least: int) -> int:
    """Returns how many of `steps` are taken in all when `done` are and the others, step_s each, have left_s.

    A step on the MXFP4 grid takes a little longer than the first ones: a fifth is kept back. Never under `least`.
    """
    return max(least, min(steps, done + int(0.8 * left_s / step_s)))


def keep_memory() -> None:
    """Has glibc keep freed memory for the next step; returned to the kernel and back, a step takes twice as long."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        print("no glibc: a step will take longer")
        return
    trim_threshold, mmap_threshold, largest = -1, -3, 1 << 30
    libc.mallopt(mmap_threshold, largest)
    libc.mallopt(trim_threshold, largest)


def train(
    config: GptOssConfig,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    *,
    report: Callable[[str], None] = print,
) -> GptOssForCausalLM:
    """Returns the warm-started model, its weights on the grids they are stored on."""
    register()
    torch.manual_seed(settings.seed)
    started, on_gpu = time.monotonic(), settings.device != "cpu"
    source = source_of(tokenizer, settings)
    model = new_model(config, sinks=settings.sinks)
    nn.Module.to(model, torch.device(settings.device))  # transformers' own says nothing of its types
    model.train()
    experts = model.config._experts_implementation
    if on_gpu:
        torch.set_float32_matmul_precision("high")
        model.config._experts_implementation = EXPERTS
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.97),
        fused=True if on_gpu else None,
    )
    warm, steps = settings.warmup_steps, settings.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))),
    )
    step, first_done = 0, started
    while step < steps:
        if settings.seconds and step == FIRST:
            first_done = time.monotonic()  # what comes once, memory and compiled kernels, is behind
        if settings.seconds and step == warm > FIRST:
            now = time.monotonic()
            left = settings.seconds - (now - started)
            step_s, least = (now - first_done) / (warm - FIRST), warm + settings.grid_steps
            steps = fitting(steps, done=warm, step_s=step_s, left_s=left, least=least)
            report(f"{steps} steps in about {settings.seconds:.0f} s")
        if step == steps - settings.grid_steps:
            for layer in model.model.layers:
                parametrize.register_parametrization(layer.mlp.experts, "gate_up_proj", OnGrid())
                parametrize.register_parametrization(layer.mlp.experts, "down_proj", OnGrid())
        batch = next(source)
        tokens = sum(len(row) for _, rows in batch for row in rows)
        losses = []
        with parametrize.cached():
            for prompt, rows in batch:
                loss, balance = rows_loss(model, prompt, rows)
                losses.append(loss.detach() / sum(map(len, rows)))
                (loss / tokens + settings.balance * balance / len(batch)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            shown = " ".join(f"{float(loss):.4f}" for loss in losses)
            report(f"step {step:5d}  loss per token {shown}  grad {norm:.2f}  {time.monotonic() - started:6.0f} s")
        step += 1
    if on_gpu:
        model.config._experts_implementation = experts
    return settle(model).cpu()


def settle(model: GptOssForCausalLM) -> GptOssForCausalLM:
    """Returns the model in eval mode with plain parameters, each rounded to what the checkpoint can hold."""
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            if parametrize.is_parametrized(layer.mlp.experts, name):
                parametrize.remove_parametrizations(layer.mlp.experts, name, leave_parametrized=True)
    on_grid = OnGrid()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            packed = name.endswith(("gate_up_proj", "down_proj"))
            parameter.copy_(on_grid(parameter) if packed else parameter.to(torch.bfloat16))
    model.config._attn_implementation = "eager"
    return model.eval()
