"""Warm start of the bundled model: supervised steps on programs that the grammars write, in fp32.

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
import random
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedTokenizerBase,
)

from stages.model.mxfp4 import dequantize, quantize
from stages.tiny import corpus

ATTENTION = "shared_prompt"


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


class Layout(NamedTuple):
    """Where the rows of a packed line lie.

    Example:
        Layout(prompt=2, places=[[2, 3, 4], [5, 6, 5]], real=[[1, 1, 1], [1, 1, 0]])   # rows of 3 and 2 tokens
    """

    prompt: int  # P
    places: Tensor  # int64 [B, L], position in the line; padding repeats the row's first token
    real: Tensor  # bool [B, L]


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
    prompt_at = torch.arange(prompt)
    row_at = prompt + torch.arange(longest)
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
    return torch.cat((torch.ones(len(query_at), 1, dtype=torch.bool), seen), 1)


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


def register() -> None:
    """Makes `shared_prompt` an attention implementation that transformers knows."""
    AttentionInterface.register(ATTENTION, shared_prompt_attention)
    AttentionMaskInterface.register(ATTENTION, no_mask)


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
    layout = pack(rows, len(prompt))
    line = torch.tensor([prompt + [token for row in rows for token in row]])
    at = torch.cat((torch.arange(len(prompt)), *(len(prompt) + torch.arange(len(row)) for row in rows)))[None]
    output = model.model(
        line, position_ids=at, attention_mask=None, use_cache=False, output_router_logits=True, layout=layout
    )
    # The last prompt token says each row's first one; the others are said by the token before.
    before = [
        [len(prompt) - 1, *index[: len(row) - 1]] for index, row in zip(layout.places.tolist(), rows, strict=True)
    ]
    speakers = torch.tensor([position for row in before for position in row])
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


def batches(
    tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> Iterator[list[tuple[list[int], list[list[int]]]]]:
    """Yields a step's (prompt, rows) per task, for ever."""
    rng = random.Random(settings.seed)
    kinds: tuple[tuple[int, Callable[[random.Random], str], Callable[[random.Random], str]], ...] = (
        (settings.game_rows, corpus.game_prompt, corpus.game_completion),
        (settings.matmul_rows, lambda _: corpus.MATMUL_PROMPT, corpus.matmul_completion),
    )
    while True:
        yield [
            (corpus.render(tokenizer, prompt(rng)), tokenizer([write(rng) for _ in range(count)]).input_ids)
            for count, prompt, write in kinds
        ]


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
    model = new_model(config, sinks=settings.sinks).train()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.97),
    )
    warm, steps = settings.warmup_steps, settings.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))),
    )
    source = batches(tokenizer, settings)
    started = time.monotonic()
    for step in range(steps):
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
                losses.append(loss.item() / sum(map(len, rows)))
                (loss / tokens + settings.balance * balance / len(batch)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            shown = " ".join(f"{loss:.4f}" for loss in losses)
            report(f"step {step:5d}  loss per token {shown}  grad {norm:.2f}  {time.monotonic() - started:6.0f} s")
    return settle(model)


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
