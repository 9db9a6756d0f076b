"""How far the engine's view of its own tokens lies from the trainer's, over updates that move the policy.

Of every update: the k3 estimate of KL(engine || trainer), the raw ratio trainer / engine, the difference of the
log-probabilities, and the share of (token, layer) that are computed with another set of experts, each also with the
engine's routes replayed in the trainer, and then the share that its routers would have sent elsewhere. The yardstick is
transformers' own eager model of the same weights, one row at a time against all rows in one padded batch: what the
shape of a batch alone changes in 16 bits.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.bench.peers import transformers_model
from stages.bench.rollouts import draw_prompts
from stages.bench.update_step import DTYPES, Setting, Stopwatch, Training, requests, rewarded
from stages.engine import Completion, Engine, Request
from stages.model.shapes import Shape
from stages.trainer import Pack, Sample, deal_packs
from stages.trainer.routes import other_experts

Row = dict[str, Any]
YARDSTICK_ROWS = 8


class Case(NamedTuple):
    """What is sampled at every update: ragged prompts, longer than a window, so that a padded batch has padding."""

    prompts: int = 4
    group_size: int = 4
    shortest: int = 160
    longest: int = 320
    new_tokens: int = 128


def case_of(shape: Shape) -> Case:
    return Case(2, 2, 10, 20, 8) if shape.name.startswith("tiny") else Case()


class Scored(NamedTuple):
    """One completion: natural logs float32 [C] of its tokens, the experts int [R, layers, k] of its last R computed
    tokens (the very last token is not computed), and those that the routers would have chosen; None where not known.
    """

    logprobs: Tensor
    routes: Tensor | None
    own: Tensor | None = None


def measure(training: Training, case: Case, *, updates: int, seed: int = 0) -> Row:
    """The figures over `updates` rollouts and updates: means of means, the largest of maxima, and each update's own."""
    slots = case.prompts * case.group_size
    engine = Engine(training.policy, max_slots=slots, max_new_tokens=case.new_tokens, record_routes=True)
    found = []
    try:
        for update in range(updates):
            completions = engine.run(requests_of(training, case, seed=seed + update))
            found.append(update_row(training, completions, case))
    finally:
        engine.close()
    return summary(found) | {"learning_rate": training.update.learning_rate, "updates": found}


def update_row(training: Training, completions: Sequence[Completion], case: Case) -> Row:
    """The figures of one rollout, which is then trained on."""
    samples = samples_of(completions, case, replay=False)
    device = training.policy.device
    engine = [Scored(torch.tensor(each.engine_logprobs, device=device), each.routes) for each in completions]
    trainer = scored(training, samples)
    row = compared(engine, trainer)
    if all(each.routes is not None for each in engine):
        replayed = scored(training, samples_of(completions, case, replay=True))
        row |= {f"replay_{name}": value for name, value in compared(engine, replayed).items()}
        own = [Scored(each.logprobs, each.own) for each in replayed]
        row["replay_own_sets_differ"] = compared(engine, own)["sets_differ"]
    packs = deal_packs(samples, sum(len(each.prompt_ids) + case.new_tokens for each in completions))
    training.step(packs, Stopwatch(device), on_policy=False)
    return row


def compared(theirs: Sequence[Scored], ours: Sequence[Scored]) -> Row:
    """What `ours` makes of the tokens that `theirs` sampled or scored, over all tokens.

    k3: the mean of exp(d) - 1 - d with d = ours - theirs, in nats (Schulman 2020); sets_differ is there where both
    know their routes.
    """
    pairs = list(zip(theirs, ours, strict=True))
    difference = torch.cat([b.logprobs.double() - a.logprobs.double() for a, b in pairs])
    row: Row = {
        "tokens": difference.numel(),
        "k3": float((torch.expm1(difference) - difference).mean()),
        "ratio_mean": float(difference.exp().mean()),
        "difference_mean": float(difference.abs().mean()),
        "difference_max": float(difference.abs().max()),
    }
    differ = [sets_differ(a.routes, b.routes) for a, b in pairs if a.routes is not None and b.routes is not None]
    if differ:
        row["sets_differ"] = float(torch.cat(differ).double().mean())
    return row


def sets_differ(first: Tensor, second: Tensor) -> Tensor:
    """bool [R * layers]: where two routings [R, layers, k] choose other experts, in whatever order; R is the shorter
    one's, both end at the same token.
    """
    rows = min(first.shape[0], second.shape[0])
    first, second = (routes[-rows:].cpu() for routes in (first, second))
    return other_experts(first, second).flatten()


def summary(rows: Sequence[Row]) -> Row:
    """Over updates: means, but of what is a maximum the largest, and tokens added up; k3_last is the last update's."""
    found: Row = {"k3_last": rows[-1]["k3"]}
    for name in rows[0]:
        values = [row[name] for row in rows if name in row]
        if name.endswith("tokens"):
            found[name] = sum(values)
        else:
            found[name] = max(values) if name.endswith("max") else statistics.fmean(values)
    return found


def requests_of(training: Training, case: Case, *, seed: int) -> list[Request]:
    """What is sampled of the case."""
    return requests(
        training,
        prompts=case.prompts,
        group_size=case.group_size,
        prompt_tokens=(case.shortest, case.longest),
        new_tokens=case.new_tokens,
        seed=seed,
    )


def samples_of(completions: Sequence[Completion], case: Case, *, replay: bool) -> list[Sample]:
    """The completions as the trainer takes them, with the engine's routes for it to replay or without."""
    rewards = [sum(each.completion_ids) for each in completions]
    return rewarded(completions, rewards, group_size=case.group_size, replay=replay)


def scored(training: Training, samples: Sequence[Sample]) -> list[Scored]:
    """The trainer's view of completions in one pack, without gradients; with the samples' routes, by them. Routes are
    those it went by.
    """
    (pack,) = deal_packs(samples, sum(len(each.prompt_ids) + len(each.completion_ids) for each in samples))
    assert [each.completion_id for each in pack.samples] == [each.completion_id for each in samples]
    own: list[Tensor] = []
    with experts_noted(training.policy.model) as used:
        logprobs = training.logprobs(pack, grad=False, replay_routes=samples[0].routes is not None, routes=own)
    routes = (of_completions(pack, torch.stack(layers, dim=1)) for layers in (used, own))
    return [Scored(*each) for each in zip(logprobs.split(pack.lengths), *routes, strict=True)]


def of_completions(pack: Pack, rows: Tensor) -> list[Tensor]:
    """What a pack's tokens have, [T, ...], for each completion and the prompt before it."""
    found, start = [], 0
    for group in pack.grouped():
        prompt = rows[start : start + len(group[0].prompt_ids)]
        start += len(prompt)
        for sample in group:
            found.append(torch.cat((prompt, rows[start : start + sample.num_tokens])))
            start += sample.num_tokens
    return found


@contextmanager
def experts_noted(model: Any) -> Iterator[list[Tensor]]:
    """Within it the experts [tokens, k] that each layer of the trainer computes with are kept, layer after layer."""
    noted: list[Tensor] = []

    def noting(trained: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted_first(hidden: Tensor, indices: Tensor, *rest: Any, **options: Any) -> Tensor:
            noted.append(indices)
            return trained(hidden, indices, *rest, **options)

        return noted_first

    modules = [layer.mlp.experts for layer in model.model.layers]
    for experts in modules:
        experts.trained = noting(experts.trained)
    try:
        yield noted
    finally:
        for experts in modules:
            del experts.trained


@contextmanager
def routes_noted(model: Any) -> Iterator[list[list[Tensor]]]:
    """Within it the experts [tokens, k] of every call of each layer's router are kept."""
    noted: list[list[Tensor]] = [[] for _ in model.model.layers]

    def keep(calls: list[Tensor]) -> Any:
        return lambda module, inputs, outputs: calls.append(outputs[2].detach())

    hooks = [
        layer.mlp.router.register_forward_hook(keep(calls))
        for layer, calls in zip(model.model.layers, noted, strict=True)
    ]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def yardstick(setting: Setting, *, device: torch.device) -> Row:
    """transformers eager against itself: each of 8 random sequences alone, and all in one batch padded on the right.

    The weights are those of the setting's policy, its experts unpacked, without the adapter.
    """
    case = case_of(setting.shape)
    lengths = (case.shortest + case.new_tokens, case.longest + case.new_tokens)
    rows = draw_prompts(YARDSTICK_ROWS, lengths, vocabulary=setting.shape.vocabulary, seed=setting.seed)
    model = transformers_model(
        setting.shape,
        device=device,
        seed=setting.seed,
        dtype=DTYPES[setting.dtype],
        unpacked=True,
        scaled_init=setting.scaled_init,
    )
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    alone = [scored_rows(model, [row], case.new_tokens)[0] for row in rows]
    return compared(alone, scored_rows(model, rows, case.new_tokens))


def scored_rows(model: Any, rows: Sequence[Sequence[int]], num_scored: int) -> list[Scored]:
    """The last `num_scored` tokens of each row, computed as one batch."""
    device = model.lm_head.weight.device
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    ids = ids.to(device)
    with routes_noted(model) as noted:
        hidden = model.model(input_ids=ids, attention_mask=mask.to(device), use_cache=False).last_hidden_state
    routes = torch.stack([torch.cat(calls).view(len(rows), width, -1) for calls in noted], dim=2)
    found = []
    for place, row in enumerate(rows):
        predicting = slice(len(row) - num_scored - 1, len(row) - 1)
        logits = model.lm_head(hidden[place, predicting]).float()
        targets = ids[place, len(row) - num_scored : len(row), None]
        logprobs = logits.log_softmax(-1).gather(-1, targets)[:, 0]
        found.append(Scored(logprobs, routes[place, predicting]))
    return found
