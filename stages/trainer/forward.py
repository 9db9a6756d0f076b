"""A pack of completions through the policy, with gradients: their log-probabilities.

The policy's own modules, layer by layer, on one line of tokens. The residual stream is float32 in every dtype, as in
the engine's step. On a card each layer keeps only what it was given (offload.py) and is computed again in backward, and
experts in the kernels' order are trained through as they are, packed (kernels/trained_experts.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.kernels.logprobs import token_logprobs
from stages.kernels.packed_attention import Groups, packed_attention
from stages.kernels.rotary import rotate
from stages.model.nf4 import Nf4Head
from stages.model.policy import Policy
from stages.trainer.offload import LayerStore
from stages.trainer.samples import Pack


class TokenLogprobs(NamedTuple):
    """Of a pack's completion tokens, one completion after the other; float32 [tokens]."""

    logprobs: Tensor
    entropy: Tensor  # nats, without gradient


class _Line(NamedTuple):
    """What every layer is told of the tokens."""

    groups: Groups
    cos: Tensor  # float32 [T, C / 2]
    sin: Tensor
    routes: Tensor | None  # int64 [T, layers, k]


def completion_logprobs(
    policy: Policy,
    pack: Pack,
    *,
    temperature: float,
    store: LayerStore | None = None,
    replay_routes: bool = False,
    routes: list[Tensor] | None = None,
    recompute: bool | None = None,
) -> TokenLogprobs:
    """The policy's own view of a pack's completions, with gradients unless they are off.

    store: on a card, what keeps the layers' inputs; without one each pass makes its own. replay_routes: the samples'
    recorded experts instead of the router's choice, weighted by its logits. routes: a list takes each router's own
    choices int64 [T, k], whether they are used or others replayed. recompute: whether layers are computed again in
    backward; None is on a card, not on the CPU.
    """
    device = policy.device
    tensors = pack.tensors(device)
    replayed = pack.routes(device) if replay_routes else None
    if replay_routes and replayed is None:
        raise ValueError("the samples have no recorded routes to replay")
    decoder = policy.model.model
    cos, sin = decoder.rotary_emb(torch.empty(1, device=device), tensors.positions[None])
    line = _Line(pack.groups(), cos[0].contiguous(), sin[0].contiguous(), replayed)
    stream = policy.embed(tensors.ids).float()
    eps = float(policy.model.config.rms_norm_eps)
    recompute = device.type == "cuda" if recompute is None else recompute
    recompute = recompute and torch.is_grad_enabled()
    if recompute:
        store = store or LayerStore(device)
        stream.requires_grad_()
    for index in range(len(decoder.layers)):
        run = _layer(policy, index, line, eps, routes)
        stream = _Recomputed.apply(stream, run, store, index, len(decoder.layers)) if recompute else run(stream, False)
    rows = F.embedding(tensors.predicting, stream)  # whose backward adds rows up in a fixed order
    hidden = _norm(rows, decoder.norm.weight, eps, policy.dtype)
    head: Any = policy.model.lm_head
    unembedding = head if isinstance(head, Nf4Head) else head.weight
    return TokenLogprobs(*token_logprobs(hidden, unembedding, tensors.targets, temperature=temperature))


class _Recomputed(torch.autograd.Function):
    """A layer that keeps its input alone; gradients of the adapter are added to its parameters in backward."""

    @staticmethod
    def forward(ctx, stream, run, store, index, num_layers):
        ctx.run, ctx.store, ctx.index = run, store, index
        store.put(index, stream, num_layers=num_layers)
        return run(stream, False)

    @staticmethod
    def backward(ctx, grad):
        stream = ctx.store.take(ctx.index).detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(stream, True)
        torch.autograd.backward(out, grad)
        return stream.grad, None, None, None, None


def _layer(
    policy: Policy, index: int, line: _Line, eps: float, routes: list[Tensor] | None
) -> Callable[[Tensor, bool], Tensor]:
    """Layer `index` as a function of the stream float32 [T, D] and of whether only its backward is wanted."""
    layer: Any = policy.model.model.layers[index]
    dtype = policy.dtype

    def run(stream: Tensor, only_backward: bool) -> Tensor:
        normed = _norm(stream, layer.input_layernorm.weight, eps, dtype)
        stream = stream + _attend(layer.self_attn, normed, line)
        normed = _norm(stream, layer.post_attention_layernorm.weight, eps, dtype)
        replayed = None if line.routes is None else line.routes[:, index]
        weights, chosen, own = _route(layer.mlp.router, normed, replayed)
        if routes is not None and not only_backward:
            routes.append(own)
        return stream + layer.mlp.experts.trained(normed, chosen, weights, only_backward=only_backward)

    return run


def _norm(stream: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(stream, weight.shape, weight, eps).to(dtype)


def _attend(attention: Any, normed: Tensor, line: _Line) -> Tensor:
    """The attention's output [T, D]."""
    channels = attention.head_dim
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


def _route(router: Any, normed: Tensor, replayed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights float32 [T, k] and experts int64 [T, k], of a token's largest logits or of the replayed experts; and the
    experts of its largest logits.
    """
    if replayed is None:
        _, weights, chosen = router(normed)
        return weights, chosen, chosen
    logits = F.linear(normed.float(), router.weight.float(), router.bias.float())
    return logits.gather(-1, replayed).softmax(-1), replayed, logits.topk(replayed.shape[-1]).indices
