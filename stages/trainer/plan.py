"""How an update keeps within a card's memory: what is worked on at once, chosen before anything is computed.

What a pass takes beside what is held (weights, adapter, optimizer, what the engine left) is worked out from the shapes:
the residual stream and its gradient, and the largest of what attention, experts and the vocabulary need while they run.
Nothing of it grows faster than the pack. Of what is left over, the last layers may keep what backward needs, which
saves computing it again: of attention first, whose gigabyte saves the most time. Compared with what the card takes in
tests/bench/results.
"""

from typing import NamedTuple

import torch

from stages.config import UpdateConfig, UserError
from stages.kernels.logprobs import Tile
from stages.kernels.trained_experts import Tiling
from stages.model.policy import Policy
from stages.trainer.optimizer import moments_to_come

RESERVE = 0.3e9  # what graphs keep for their next run and pages that are held for a little
FRAGMENTS = 1.05  # of what a pass holds, what the allocator needs
KEPT_SHARE = 0.45  # of what is left over, what layers may keep: the rest is for others, and what the sum leaves out
GB = 1e9


class Plan(NamedTuple):
    """What is worked on at once."""

    experts: Tiling
    vocabulary: Tile
    kept_attention: int = 0  # of so many layers, the last ones, what backward needs stays on the card
    kept_experts: int = 0


# The first that fits is taken, the fastest first.
PLANS = (
    Plan(Tiling(16_384, 128), Tile(4096, 16_384)),
    Plan(Tiling(16_384, 32), Tile(4096, 8192)),
    Plan(Tiling(8192, 16), Tile(4096, 8192)),
    Plan(Tiling(8192, 8), Tile(2048, 8192)),
    Plan(Tiling(8192, 4), Tile(2048, 8192)),
    Plan(Tiling(4096, 4), Tile(2048, 8192)),
    Plan(Tiling(2048, 4), Tile(1024, 8192)),
    Plan(Tiling(1024, 2), Tile(512, 8192)),
)


class Sizes(NamedTuple):
    """Of a policy; bytes where not said otherwise."""

    width: int  # D
    heads: int  # of queries
    heads_width: int  # those times channels
    keys_width: int
    inner: int  # F, of an expert
    experts: int
    top_k: int
    layers: int
    keepable: int  # layers whose experts may keep their graph: where autograd trains them it takes three times as much
    held: int  # weights on the card, adapter, its gradients and the optimizer's state, and what else is there
    number: int  # of the compute dtype

    @classmethod
    def of(cls, policy: Policy, *, held: int) -> "Sizes":
        config = policy.model.config
        return cls(
            width=config.hidden_size,
            heads=config.num_attention_heads,
            heads_width=config.num_attention_heads * config.head_dim,
            keys_width=config.num_key_value_heads * config.head_dim,
            inner=config.intermediate_size,
            experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            layers=config.num_hidden_layers,
            keepable=sum(layer.mlp.experts.trained_by_kernels for layer in policy.model.model.layers),
            held=held,
            number=policy.dtype.itemsize,
        )


def needed_bytes(sizes: Sizes, tokens: int, plan: Plan) -> int:
    """The most that one pass over a pack of `tokens` tokens holds of the card, all included.

    It is backward's: a block's input and the one before it, the norm, the gradient of the stream, and beside them what
    attention or the experts need; or what the vocabulary needs before any block.
    """
    number, width, inner = sizes.number, sizes.width, sizes.inner
    stream = tokens * width * (4 + 3 * number)
    # queries, outputs, and the gradients of both; keys and values; two figures of each query and head
    attention = tokens * (4 * sizes.heads_width * number + 6 * sizes.keys_width * number + 8 * sizes.heads)
    rows = min(plan.experts.rows, tokens) * sizes.top_k
    at_once = min(plan.experts.experts, sizes.experts)
    share = min(1.0, 2 * at_once / sizes.experts)  # of the rows, as experts are not chosen evenly
    experts = at_once * 2 * width * inner * number + int(rows * share * (2 * width + 5 * inner) * number)
    if at_once < sizes.experts:
        experts += 2 * rows * width * number  # what the rows' gradients are gathered in
    experts += 3 * tokens * width * number  # the norm's gradient from experts and router, and their sum
    tile = plan.vocabulary
    vocabulary = min(tile.rows, tokens) * (tile.columns * (4 + number) + 3 * 4 * width)
    vocabulary += tokens * width * (8 + 2 * number)
    kept = plan.kept_attention * kept_attention_bytes(sizes) + plan.kept_experts * kept_experts_bytes(sizes)
    kept *= tokens
    return sizes.held + int(FRAGMENTS * (max(stream + max(attention, experts), vocabulary) + kept) + RESERVE)


def kept_attention_bytes(sizes: Sizes) -> int:
    """What a layer keeps of one token: queries, keys, values and attention's output."""
    return (2 * sizes.heads_width + 2 * sizes.keys_width) * sizes.number + 4 * sizes.heads


def kept_experts_bytes(sizes: Sizes) -> int:
    """What a layer keeps of one token: gate_up's output of each chosen expert."""
    return 2 * sizes.top_k * sizes.inner * sizes.number


def held_bytes(policy: Policy, update: UpdateConfig, optimizer: torch.optim.Optimizer) -> int:
    """What is held of the card while an update runs: what is there now, and the gradients and moments to come."""
    gradients = sum(parameter.nbytes for _, parameter in policy.parameters() if parameter.grad is None)
    return torch.cuda.memory_allocated(policy.device) + gradients + moments_to_come(policy, update, optimizer)


def plan_update(policy: Policy, tokens: int, *, update: UpdateConfig, optimizer: torch.optim.Optimizer) -> Plan:
    """The fastest plan by which packs of up to `tokens` tokens stay within update.memory_bytes; 0 is what no other
    program has of the card.

    On a CPU nothing is planned. Raises UserError saying what is needed, and what would fit, when none does.
    """
    if policy.device.type != "cuda":
        return PLANS[0]
    sizes = Sizes.of(policy, held=held_bytes(policy, update, optimizer))
    free, _ = torch.cuda.mem_get_info(policy.device)
    budget = update.memory_bytes or free + torch.cuda.memory_reserved(policy.device)
    return choose_plan(sizes, tokens, budget, optimizer=update.optimizer)


def choose_plan(sizes: Sizes, tokens: int, budget_bytes: float, *, optimizer: str = "adamw") -> Plan:
    """As `plan_update`, of sizes and a budget."""
    for plan in PLANS:
        left = budget_bytes - needed_bytes(sizes, tokens, plan)
        if left >= 0:
            room = KEPT_SHARE * left / (FRAGMENTS * tokens)  # bytes a token
            attention = min(int(room / kept_attention_bytes(sizes)), sizes.layers)
            room -= attention * kept_attention_bytes(sizes)
            experts = min(int(room / kept_experts_bytes(sizes)), sizes.keepable)
            return plan._replace(kept_attention=attention, kept_experts=experts)
    least = needed_bytes(sizes, tokens, PLANS[-1])
    fitting = longest_fitting(sizes, budget_bytes)
    hints = []
    if fitting:
        hints.append(f"completions and update.pack_tokens of at most {fitting} tokens")
    else:
        hints.append(f"a budget of {least / GB:.1f} GB")
    if "8bit" not in optimizer:
        hints.append("update.optimizer=adamw_8bit, update.lora_dtype=bfloat16")
    hints.append("model.dense=nf4, model.offload_embedding=true, or a smaller update.lora_rank")
    raise UserError(
        f"an update of {tokens} tokens at once needs {least / GB:.1f} GB of the card, and it may take "
        f"{budget_bytes / GB:.1f} GB ({sizes.held / GB:.1f} GB are weights, adapter, optimizer and the engine's rest)",
        "what would help: " + "; ".join(hints),
    )


def longest_fitting(sizes: Sizes, budget_bytes: float) -> int:
    """The most tokens that fit, in steps of 256; 0 when none do."""
    low, high = 0, 2**14
    while low < high:
        middle = (low + high + 1) // 2
        fits = needed_bytes(sizes, 256 * middle, PLANS[-1]) <= budget_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return 256 * low
