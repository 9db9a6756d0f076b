"""A pack of completions through the policy, with gradients: their log-probabilities.

The policy's own modules, block by block (a layer is two: attention and experts), on one line of tokens. The residual
stream is float32 in every dtype, as in the engine's step. On a card each block keeps only what it was given, rounded to
the compute dtype (offload.py), and the experts that were chosen; it is computed again in backward. Experts in the
kernels' order are trained through as they are, packed (kernels/trained_experts.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.kernels.logprobs import token_logprobs
from stages.kernels.norms import add_rms_norm_grad, rms_norm
from stages.kernels.packed_attention import Groups, packed_attention
from stages.kernels.rotary import rotate
from stages.kernels.routing import trained_router_logits
from stages.kernels.trained_experts import Tiling
from stages.model.nf4 import Nf4Head
from stages.model.policy import Policy
from stages.trainer.offload import LayerStore
from stages.trainer.plan import PLANS, Plan
from stages.trainer.samples import Pack


class TokenLogprobs(NamedTuple):
    """Of a pack's completion tokens, one completion after the other; float32 [tokens]."""

    logprobs: Tensor
    entropy: Tensor  # nats, without gradient


class _Line(NamedTuple):
    """What every block is told of the tokens."""

    groups: Groups
    cos: Tensor  # float32 [T, C / 2]
    sin: Tensor


class _Block(NamedTuple):
    """One residual block: stream += run(norm(stream), False), the norm and the result [T, D].

    run's second argument says that only a graph for backward is wanted, not the values.
    """

    weight: Tensor  # of the norm, [D]
    run: Callable[[Tensor, bool], Tensor]


def completion_logprobs(
    policy: Policy,
    pack: Pack,
    *,
    temperature: float,
    store: LayerStore | None = None,
    replay_routes: bool = False,
    routes: list[Tensor] | None = None,
    recompute: bool | None = None,
    plan: Plan = PLANS[0],
) -> TokenLogprobs:
    """The policy's own view of a pack's completions, with gradients unless they are off.

    store: on a card, what keeps the blocks' inputs; without one each pass makes its own. replay_routes: the samples'
    recorded experts instead of the router's choice, weighted by its logits. routes: a list takes each layer's own
    choices int64 [T, k]. recompute: whether blocks are computed again in backward; None is on a card, not on the CPU.
    plan: what is worked on at once.
    """
    device = policy.device
    tensors = pack.tensors(device)
    replayed = pack.routes(device) if replay_routes else None
    if replay_routes and replayed is None:
        raise ValueError("the samples have no recorded routes to replay")
    decoder = policy.model.model
    cos, sin = decoder.rotary_emb(torch.empty(1, device=device), tensors.positions[None])
    line = _Line(pack.groups(), cos[0].contiguous(), sin[0].contiguous())
    eps = float(policy.model.config.rms_norm_eps)
    recompute = device.type == "cuda" if recompute is None else recompute
    recompute = recompute and torch.is_grad_enabled()
    blocks = []
    for index, layer in enumerate(decoder.layers):
        chosen = None if replayed is None else replayed[:, index]
        blocks.append(_attention_block(layer, line))
        blocks.append(_experts_block(layer, chosen, routes, plan.experts, kept=recompute))
    stream = policy.embed(tensors.ids).float()
    if recompute:
        stream = _Recomputed.apply(stream.requires_grad_(), blocks, eps, policy.dtype, store or LayerStore(device))
    else:
        for block in blocks:
            stream = stream + block.run(rms_norm(stream, block.weight, dtype=policy.dtype, eps=eps), False)
    # an embedding's backward adds rows up in a fixed order
    rows = F.embedding(tensors.predicting, stream)
    hidden = rms_norm(rows, decoder.norm.weight, dtype=policy.dtype, eps=eps)
    head: Any = policy.model.lm_head
    unembedding = head if isinstance(head, Nf4Head) else head.weight
    found = token_logprobs(hidden, unembedding, tensors.targets, temperature=temperature, tile=plan.vocabulary)
    return TokenLogprobs(*found)


class _Recomputed(torch.autograd.Function):
    """All blocks, of which each one's input alone is kept. Backward takes them one by one and adds the gradients of the
    adapter to its parameters; none flows to the embedding.
    """

    @staticmethod
    def forward(ctx, stream, blocks, eps, dtype, store):
        ctx.blocks, ctx.eps, ctx.dtype, ctx.store = blocks, eps, dtype, store
        stream = stream.clone()
        for index, block in enumerate(blocks):
            store.put(index, stream.to(dtype, copy=True), num_layers=len(blocks))
            stream += block.run(rms_norm(stream, block.weight, dtype=dtype, eps=eps), False)
        return stream

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        for index, block in reversed(list(enumerate(ctx.blocks))):
            stream = ctx.store.take(index)
            normed = rms_norm(stream, block.weight, dtype=ctx.dtype, eps=ctx.eps).requires_grad_()
            with torch.enable_grad():
                out = block.run(normed, True)
            torch.autograd.backward(out, grad.to(out.dtype))
            del out
            add_rms_norm_grad(stream, block.weight, normed.grad, grad, eps=ctx.eps)
        return None, None, None, None, None


def _attention_block(layer: Any, line: _Line) -> _Block:
    attention = layer.self_attn
    channels = attention.head_dim

    def run(normed: Tensor, _only_backward: bool) -> Tensor:
        query, key, value = (
            project(normed).unflatten(1, (-1, channels))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        attended = packed_attention(
            rotate(query, line.cos, line.sin),
            rotate(key, line.cos, line.sin),
            value,
            sinks=attention.sinks,
            scale=attention.scaling,
            window=attention.sliding_window,
            groups=line.groups,
        )
        out: Tensor = attention.o_proj(attended.flatten(1))
        return out

    return _Block(layer.input_layernorm.weight, run)


def _experts_block(
    layer: Any, replayed: Tensor | None, routes: list[Tensor] | None, tiling: Tiling, *, kept: bool
) -> _Block:
    """replayed: the experts int64 [T, k] to take. kept: those of the first pass are remembered for the next."""
    router, experts = layer.mlp.router, layer.mlp.experts
    remembered: list[Tensor] = []

    def run(normed: Tensor, only_backward: bool) -> Tensor:
        logits = trained_router_logits(normed, router.weight, router.bias)
        chosen = remembered.pop().long() if only_backward else replayed
        if chosen is None or (routes is not None and not only_backward):
            own = logits.detach().topk(router.top_k, dim=-1).indices
            if routes is not None:
                routes.append(own)
            chosen = own if chosen is None else chosen
        if kept and not only_backward:
            remembered.append(chosen.to(torch.uint8))
        weights = logits.gather(-1, chosen).softmax(-1)
        out: Tensor = experts.trained(normed, chosen, weights, tiling=tiling, only_backward=only_backward)
        return out

    return _Block(layer.post_attention_layernorm.weight, run)
