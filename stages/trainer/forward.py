"""A pack of completions through the policy, with gradients: their log-probabilities.

The policy's own modules, block by block (a layer is two: attention and experts), on one line of tokens. The residual
stream is float32 in every dtype, as in the engine's step. On a card each block keeps only what it was given, rounded to
the compute dtype (offload.py), and the experts that were chosen, and is computed again in backward, but for those of
the last layers that the plan lets keep more. Experts in the kernels' order are trained through as they are, packed
(kernels/trained_experts.py).
"""

from collections.abc import Callable
from enum import Enum, auto
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.kernels.logprobs import token_logprobs
from stages.kernels.norms import add_rms_norm_grad, advance, rms_norm, write_rms_norm
from stages.kernels.packed_attention import Groups, packed_attention
from stages.kernels.rotary import rotate
from stages.kernels.routing import trained_router_logits
from stages.kernels.trained_experts import Tiling
from stages.kernels.trained_linear import trained_linear
from stages.model.lora import projection
from stages.model.nf4 import Nf4Head, unembed
from stages.model.policy import Policy
from stages.trainer.offload import LayerStore
from stages.trainer.plan import PLANS, Plan
from stages.trainer.samples import Pack, PackTensors

DISTRIBUTIONS_AT_ONCE = 64  # tokens; 0.1 GB of the card with gpt-oss's vocabulary


class TokenLogprobs(NamedTuple):
    """Of a pack's completion tokens, one completion after the other; float32 [tokens]."""

    logprobs: Tensor
    entropy: Tensor  # nats, without gradient


class _Line(NamedTuple):
    """What every block is told of the tokens."""

    groups: Groups
    cos: Tensor  # float32 [T, C / 2]
    sin: Tensor


class _Wanted(Enum):
    """What running a block is for."""

    VALUES = auto()  # it is computed again in backward
    GRAPH = auto()  # for backward alone, the values are known
    BOTH = auto()


_Run = Callable[[Tensor, _Wanted], Tensor]


class _Block(NamedTuple):
    """One residual block: stream += run(norm(stream), wanted), the norm and the result [T, D]."""

    weight: Tensor  # of the norm, [D]
    run: _Run
    kept: bool  # whether its graph stays, where blocks are computed again


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
    tensors = pack.tensors(policy.device)
    hidden = _predicting(
        policy,
        pack,
        tensors,
        store=store,
        replay_routes=replay_routes,
        routes=routes,
        recompute=recompute,
        plan=plan,
    )
    head: Any = policy.model.lm_head
    unembedding = head if isinstance(head, Nf4Head) else head.weight
    found = token_logprobs(hidden, unembedding, tensors.targets, temperature=temperature, tile=plan.vocabulary)
    return TokenLogprobs(*found)


@torch.no_grad()
def completion_distributions(policy: Policy, pack: Pack) -> Tensor:
    """Log-probabilities float32 [tokens, V] of all that could stand at each place of a pack's completions, on the CPU.

    Little of the card is used at once; what comes back is large: 0.8 MB a token of gpt-oss's vocabulary.
    """
    hidden = _predicting(policy, pack, pack.tensors(policy.device), plan=PLANS[-1])
    head: Any = policy.model.lm_head
    parts = []
    for part in hidden.split(DISTRIBUTIONS_AT_ONCE):
        logits = unembed(head, part) if part.is_cuda else head(part).float()
        parts.append(logits.log_softmax(-1).cpu())
    return torch.cat(parts)


def _predicting(
    policy: Policy,
    pack: Pack,
    tensors: PackTensors,
    *,
    store: LayerStore | None = None,
    replay_routes: bool = False,
    routes: list[Tensor] | None = None,
    recompute: bool | None = None,
    plan: Plan,
) -> Tensor:
    """The last norm's output [all completion tokens, D] of the tokens that each one follows; as completion_logprobs."""
    device = policy.device
    replayed = pack.routes(device) if replay_routes else None
    if replay_routes and replayed is None:
        raise ValueError("the samples have no recorded routes to replay")
    decoder = policy.model.model
    cos, sin = decoder.rotary_emb(torch.empty(1, device=device), tensors.positions[None])
    line = _Line(pack.groups(), cos[0].contiguous(), sin[0].contiguous())
    eps = float(policy.model.config.rms_norm_eps)
    recompute = device.type == "cuda" if recompute is None else recompute
    recompute = recompute and torch.is_grad_enabled()
    blocks, num_layers = [], len(decoder.layers)
    for index, layer in enumerate(decoder.layers):
        chosen = None if replayed is None else replayed[:, index]
        run = _attention(layer, line)
        blocks.append(_Block(layer.input_layernorm.weight, run, index >= num_layers - plan.kept_attention))
        run = _experts(layer, chosen, routes, plan.experts)
        blocks.append(_Block(layer.post_attention_layernorm.weight, run, index >= num_layers - plan.kept_experts))

    def embed() -> Tensor:
        return policy.embed(tensors.ids).float()

    if recompute:
        hook = torch.empty(0, device=device, requires_grad=True)
        store = store or LayerStore(device)
        stream = _Recomputed.apply(hook, embed, blocks, eps, policy.dtype, store)
    else:
        wanted = _Wanted.BOTH if torch.is_grad_enabled() else _Wanted.VALUES
        stream = embed()
        for block in blocks:
            stream = stream + block.run(rms_norm(stream, block.weight, dtype=policy.dtype, eps=eps), wanted)
    # an embedding's backward adds rows up in a fixed order
    rows = F.embedding(tensors.predicting, stream)
    return rms_norm(rows, decoder.norm.weight, dtype=policy.dtype, eps=eps)


class _Recomputed(torch.autograd.Function):
    """All blocks, of which each one's input is kept, and the graph of those that say so. Backward takes them one by one
    and adds the gradients of the adapter to its parameters; none flows to the embedding. `hook` is an empty tensor that
    wants a gradient, so that there is a backward. The stream's gradient is updated in place.
    """

    @staticmethod
    def forward(ctx, hook, embed, blocks, eps, dtype, store):
        ctx.blocks, ctx.eps, ctx.store = blocks, eps, store
        ctx.kept = []
        stream, out = embed(), None
        store.begin(len(blocks), like=stream, dtype=dtype)
        for index, block in enumerate(blocks):
            normed = advance(stream, out, block.weight, store.place(index), eps=eps)
            store.put(index)
            if not block.kept:
                out = block.run(normed, _Wanted.VALUES)
                continue
            with torch.enable_grad():
                out = block.run(normed.requires_grad_(), _Wanted.BOTH)
                ctx.kept.append((normed, _Ending(out)))
            out = out.detach()
            normed.untyped_storage().resize_(0)  # written again in backward, where the graph finds it
        stream += out
        return stream

    @staticmethod
    def backward(ctx, grad):
        for index, block in reversed(list(enumerate(ctx.blocks))):
            stream = ctx.store.take(index)
            if block.kept:
                normed, ending = ctx.kept.pop()
                normed.untyped_storage().resize_(stream.nbytes)
                write_rms_norm(stream, block.weight, normed, eps=ctx.eps)
            else:
                normed = rms_norm(stream, block.weight, dtype=stream.dtype, eps=ctx.eps).requires_grad_()
                with torch.enable_grad():
                    ending = _Ending(block.run(normed, _Wanted.GRAPH))
            ending.backward(grad)
            add_rms_norm_grad(stream, block.weight, normed.grad, grad, eps=ctx.eps)
        return None, None, None, None, None, None


class _Ending:
    """The end of a block's graph, without its values."""

    def __init__(self, out: Tensor) -> None:
        self._dtype = out.dtype
        self._given: list[Tensor] = []
        self._end: Tensor = _Given.apply(out, self._given)

    def backward(self, grad: Tensor) -> None:
        """Goes back from here, `grad` being the gradient of the values."""
        self._given.append(grad.to(self._dtype))
        torch.autograd.backward(self._end)


class _Given(torch.autograd.Function):
    """Where backward begins with the gradient in a list of one. It is taken out, so that its memory is free once used;
    the arguments of torch.autograd.backward live until that returns.
    """

    @staticmethod
    def forward(ctx, out, given):
        ctx.given = given
        return out.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return ctx.given.pop(), None


def _attention(layer: Any, line: _Line) -> _Run:
    attention = layer.self_attn
    channels = attention.head_dim

    def run(normed: Tensor, wanted: _Wanted) -> Tensor:
        found = trained_linear(
            normed, [projection(attention.get_submodule(name)) for name in ("q_proj", "k_proj", "v_proj")]
        )
        query, key, value = (x.unflatten(1, (-1, channels)) for x in found)
        attended = packed_attention(
            *rotate(query, key, line.cos, line.sin),
            value,
            sinks=attention.sinks,
            scale=attention.scaling,
            window=attention.sliding_window,
            groups=line.groups,
        )
        (out,) = trained_linear(
            attended.flatten(1), [projection(attention.o_proj)], only_backward=wanted is _Wanted.GRAPH
        )
        return out

    return run


def _experts(layer: Any, replayed: Tensor | None, routes: list[Tensor] | None, tiling: Tiling) -> _Run:
    """replayed: the experts int64 [T, k] to take."""
    router, experts = layer.mlp.router, layer.mlp.experts
    remembered: list[Tensor] = []  # the experts of a first pass, for its second

    def run(normed: Tensor, wanted: _Wanted) -> Tensor:
        logits = trained_router_logits(normed, router.weight, router.bias)
        chosen = remembered.pop().long() if wanted is _Wanted.GRAPH else replayed
        if chosen is None or (routes is not None and wanted is not _Wanted.GRAPH):
            own = logits.detach().topk(router.top_k, dim=-1).indices
            if routes is not None:
                routes.append(own)
            chosen = own if chosen is None else chosen
        if wanted is _Wanted.VALUES:
            remembered.append(chosen.to(torch.uint8))
        weights = logits.gather(-1, chosen).softmax(-1)
        out: Tensor = experts.trained(
            normed,
            chosen,
            weights,
            tiling=tiling,
            only_backward=wanted is _Wanted.GRAPH,
            keep=wanted is _Wanted.BOTH,
        )
        return out

    return run
