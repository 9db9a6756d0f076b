"""How an update keeps within a card's memory: what is worked on at once, chosen before anything is computed.

What a pass takes beside what is held (weights, adapter, optimizer) is worked out from the shapes: the residual stream
and its gradient, and the largest of what attention, experts and the vocabulary need while they run. Nothing of it
grows faster than the pack. Compared with what the card takes in tests/bench/results.
"""

from typing import NamedTuple

import torch

from stages.config import UserError
from stages.kernels.logprobs import Tile
from stages.kernels.trained_experts import Tiling
from stages.model.policy import Policy

RESERVE = 0.3e9  # cuBLAS's workspaces
FRAGMENTS = 1.05  # of what a pass holds, what the allocator needs
GB = 1e9


class Plan(NamedTuple):
    """What is worked on at once."""

    experts: Tiling
    vocabulary: Tile


# The roomiest that fits is taken.
PLANS = (
    Plan(Tiling(16_384, 128), Tile(4096, 16_384)),
    Plan(Tiling(16_384, 32), Tile(4096, 8192)),
    Plan(Tiling(8192, 16), Tile(4096, 8192)),
    Plan(Tiling(8192, 8), Tile(2048, 8192)),
    Plan(Tiling(4096, 8), Tile(2048, 8192)),
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
    held: int  # weights on the card, adapter, its gradients and the optimizer's state
    number: int  # of the compute dtype

    @classmethod
    def of(cls, policy: Policy, *, optimizer: str) -> "Sizes":
        config = policy.model.config
        parameters = [parameter for _, parameter in policy.parameters()]
        state = 2 if "8bit" in optimizer else 8
        adapter = sum(parameter.numel() * (2 * parameter.element_size() + state) for parameter in parameters)
        mine = {id(parameter) for parameter in parameters}
        weights = [x for x in (*policy.model.parameters(), *policy.model.buffers()) if id(x) not in mine]
        return cls(
            width=config.hidden_size,
            heads=config.num_attention_heads,
            heads_width=config.num_attention_heads * config.head_dim,
            keys_width=config.num_key_value_heads * config.head_dim,
            inner=config.intermediate_size,
            experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            held=adapter + sum(x.nbytes for x in weights if x.device == policy.device),
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
        experts += 4 * rows * width * number  # the parts, and all of them in one
    experts += 3 * tokens * width * number  # the norm's gradient from experts and router, and their sum
    tile = plan.vocabulary
    vocabulary = min(tile.rows, tokens) * (tile.columns * (4 + number) + 3 * 4 * width)
    vocabulary += tokens * width * (8 + 2 * number)
    return sizes.held + int(FRAGMENTS * max(stream + max(attention, experts), vocabulary) + RESERVE)


def plan_update(policy: Policy, tokens: int, *, optimizer: str, budget_bytes: float = 0) -> Plan:
    """The roomiest plan by which packs of up to `tokens` tokens stay within the budget; 0 is what no other has
    of the card.

    On a CPU nothing is planned. Raises UserError saying what is needed, and what would fit, when none does.
    """
    if policy.device.type != "cuda":
        return PLANS[0]
    free, _ = torch.cuda.mem_get_info(policy.device)
    budget = budget_bytes or free + torch.cuda.memory_reserved(policy.device)
    return choose_plan(Sizes.of(policy, optimizer=optimizer), tokens, budget, optimizer=optimizer)


def choose_plan(sizes: Sizes, tokens: int, budget_bytes: float, *, optimizer: str = "adamw") -> Plan:
    """As `plan_update`, of sizes."""
    for plan in PLANS:
        if needed_bytes(sizes, tokens, plan) <= budget_bytes:
            return plan
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
        f"{budget_bytes / GB:.1f} GB ({sizes.held / GB:.1f} GB are weights, adapter and optimizer)",
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
