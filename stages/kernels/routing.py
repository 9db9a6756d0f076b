"""Which experts a token goes to, and which tokens an expert works on, decided without the host.

Shapes as in the package's docstring, A = N * k assignments.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.kernels.launch import applied, launch_options, power_of_two

ALONE_ROWS = 4
ONE_HOT = 16_384  # entries of the one-hot matrix that a program counts
EXPERTS_PER_PROGRAM = 4  # the same for every N: sums within a program go by its shape


class Routing(NamedTuple):
    """The choices of N tokens, and the same sorted by expert."""

    indices: Tensor  # int32 [N, k], the likeliest first
    weights: Tensor  # float32 [N, k], sum 1
    order: Tensor  # int32 [A], assignments token * k + choice, those of an expert together
    tiles: Tensor  # int32 [T, 3]: expert, first place in `order`, count; count 0 is no tile


def router_logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """float32 [N, E], never rounded to less: near ties would go another way than the trainer's.

    hidden [N, D]; weight [E, D]; bias [E].
    """
    from stages.kernels.triton_routing import router_kernel

    num_rows, width = hidden.shape
    num_experts = weight.shape[0]
    experts = min(EXPERTS_PER_PROGRAM, num_experts)
    logits = torch.empty(num_rows, num_experts, dtype=torch.float32, device=hidden.device)
    router_kernel[(num_rows, num_experts // experts)](
        hidden, weight, bias, logits, D=width, E=num_experts, EB=experts, DP=power_of_two(width),
        **launch_options(hidden, warps=4),
    )  # fmt: skip
    return logits


def trained_router_logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `router_logits`, for many rows at once and with gradients. In 16 bits a float32 weight is taken as the sum of
    two matrices of hidden's type, whose products tensor cores add up in float32: what is lost is 2^-17 of a weight.
    """
    if hidden.is_cuda and hidden.dtype != torch.float32:
        out: Tensor = applied(_RouterLogits, hidden, weight, bias)
        return out
    return F.linear(hidden.float(), weight.float(), bias.float())


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias):
        ctx.save_for_backward(hidden, weight)
        if weight.dtype == hidden.dtype:
            return torch.mm(hidden, weight.mT, out_dtype=torch.float32).add_(bias)
        high = weight.to(hidden.dtype)
        low = (weight.float() - high.float()).to(hidden.dtype)
        both = torch.mm(hidden, torch.cat((high, low)).mT, out_dtype=torch.float32)
        return both[:, : len(weight)] + both[:, len(weight) :] + bias.float()

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        narrow = grad.to(hidden.dtype)
        of_weight = of_bias = None
        if ctx.needs_input_grad[1]:
            of_weight = torch.mm(narrow.mT, hidden, out_dtype=torch.float32).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum(0)
        return narrow @ weight.to(hidden.dtype), of_weight, of_bias


def route(logits: Tensor, *, top_k: int, tile: int) -> Routing:
    """The top_k experts of each token and tiles of at most `tile` tokens of one expert.

    logits float32 [N, E], E a power of two. Up to ALONE_ROWS tokens every assignment is a tile of its own: two that
    chose the same expert find its weights in the cache.
    """
    from stages.kernels.triton_routing import sort_kernel, top_k_kernel

    num_rows, num_experts = logits.shape
    assigned = num_rows * top_k
    alone = num_rows <= ALONE_ROWS
    num_tiles = assigned if alone else min(assigned, num_experts + assigned // tile)
    device = logits.device
    routing = Routing(
        indices=torch.empty(num_rows, top_k, dtype=torch.int32, device=device),
        weights=torch.empty(num_rows, top_k, dtype=torch.float32, device=device),
        order=torch.empty(assigned, dtype=torch.int32, device=device),
        tiles=torch.empty(num_tiles, 3, dtype=torch.int32, device=device),
    )
    top_k_kernel[(num_rows,)](
        logits, *routing, E=num_experts, TOPK=top_k, ALONE=alone, **launch_options(logits, warps=1)
    )
    if not alone:
        sort_kernel[(num_experts,)](
            routing.indices, routing.order, routing.tiles, assigned, num_tiles,
            E=num_experts, AP=power_of_two(assigned), TP=power_of_two(num_tiles), BN=tile,
            **launch_options(logits, warps=4 if assigned <= 256 else 8),
        )  # fmt: skip
    return routing


class Sorted(NamedTuple):
    """Assignments token * k + choice in the order of their experts, those of one in their own."""

    assigned: Tensor  # int64 [A], which one stands at a place
    owner: Tensor  # int64 [A], its expert
    places: Tensor  # int64 [A], where each one stands
    ends: Tensor  # int32 [E], the place behind an expert's last


def sort_by_expert(indices: Tensor, num_experts: int) -> Sorted:
    """A stable sort of int64 [N, k] for any N, by counting; nothing waits for the card."""
    from stages.kernels.triton_routing import count_kernel, place_kernel

    flat = indices.flatten()
    number = len(flat)
    padded = power_of_two(num_experts)
    block = max(16, ONE_HOT // padded)
    num_blocks = -(-number // block)
    counts = torch.empty(num_experts, num_blocks, dtype=torch.int32, device=indices.device)
    options = {"E": num_experts, "EP": padded, "BLOCK": block, "num_warps": 8}
    count_kernel[(num_blocks,)](flat, counts, number, num_blocks, **options)
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    assigned, owner, places = torch.empty(3, number, dtype=torch.int64, device=indices.device)
    place_kernel[(num_blocks,)](flat, counts, ends, assigned, owner, places, number, num_blocks, **options)
    ends = ends.view(num_experts, num_blocks)[:, -1].contiguous()
    return Sorted(assigned, owner, places, ends)
