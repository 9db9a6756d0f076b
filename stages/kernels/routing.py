"""Which experts a token goes to, and which tokens an expert works on, decided without the host.

Shapes as in the package's docstring, A = N * k assignments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stages.kernels.launch import launch_options, power_of_two

ALONE_ROWS = 4


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
    experts = 1 if num_rows <= 4 else min(8, num_experts)
    logits = torch.empty(num_rows, num_experts, dtype=torch.float32, device=hidden.device)
    router_kernel[(num_rows, num_experts // experts)](
        hidden, weight, bias, logits, D=width, E=num_experts, EB=experts, DP=power_of_two(width),
        **launch_options(hidden, warps=4 if experts == 1 else 8),
    )  # fmt: skip
    return logits


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
            routing.indices, routing.order, routing.tiles, assigned, num_tiles, E=num_experts, AP=power_of_two(assigned),
            TP=power_of_two(num_tiles), BN=tile, **launch_options(logits, warps=4 if assigned <= 256 else 8),
        )  # fmt: skip
    return routing
