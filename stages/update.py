"""update: `update.loss` on the adapter, from the completions and rewards of one iteration.

    python -m stages.update --run-dir R --iteration 3

Writes the checkpoint (adapter in PEFT's layout, optimizer.safetensors, state.json: what the next update goes on from),
metrics.parquet (one row an optimizer step) and samples.parquet (what each completion was trained with). The completions
are dealt into `update.steps` batches; each is one optimizer step, its gradient accumulated over packs. What a loss
leaves out (dapo: groups without signal) is scored like the rest and takes no part in a step. With update.replay_routes
the policy is computed with the experts that the engine chose, the reference with its own.
"""

import logging
import math
import time
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.artifacts import StageContext, StageId, derive
from stages.artifacts.command import main as command_main
from stages.artifacts.parquet import METRICS, ROLLOUTS, SAMPLES, SCORES, read_table, write_parts
from stages.config import NOT_FINITE_HINT, RunConfig, UpdateConfig, UserError
from stages.grpo import (
    LOSSES,
    Agreement,
    LossInputs,
    LossMetrics,
    StepTotals,
    Unread,
    advantages,
    correction,
    learning_rate_at,
    overlong_penalty,
    policy_loss,
    scale_of,
    signal,
)
from stages.kernels.transfer import upload
from stages.model.policy import Policy, live_policy
from stages.trainer import LayerStore, Pack, Sample, completion_logprobs, deal_packs
from stages.trainer.optimizer import make_optimizer, make_scaler, restore_optimizer, save_optimizer
from stages.trainer.plan import plan_update
from stages.trainer.routes import other_experts

log = logging.getLogger(__name__)

MAX_ENGINE_KL = 0.01  # nats a token; others accept 0.002 to 0.015 for mixtures of experts in bf16


class Scored(NamedTuple):
    """Of a pack's completion tokens, one completion after the other, float32 [tokens]; and of its routes."""

    logprobs: Tensor
    entropy: Tensor
    # int64 [], (token, layer) pairs whose experts the trainer would choose otherwise; None: not recorded
    differing: Tensor | None


def run(context: StageContext) -> None:
    """Trains the policy of version `context.stage.index` one version on.

    No gradient is left on the card, whatever comes. Raises UserError where the update cannot fit the card's memory.
    """
    assert context.stage.index is not None
    policy = live_policy(context, context.stage.index)
    try:
        train(context, policy, context.stage.index)
    finally:
        for _, parameter in policy.parameters():
            parameter.grad = None


def train(context: StageContext, policy: Policy, iteration: int) -> None:
    """Reads the iteration, takes the optimizer's steps, writes checkpoint and tables."""
    config = context.config
    update = config.update
    shape = policy.model.config
    samples, silent_ids, silent_groups = read_samples(context, iteration, top_k=shape.num_experts_per_tok)
    left_out = silent_ids if LOSSES[update.loss].drops_silent_groups else set()
    batches = packed_batches(samples, left_out, update, seed=derive("deal", config.train.seed, iteration))
    optimizer, scaler = make_optimizer(policy, update), make_scaler(policy)
    step = 0
    if iteration > 0:
        step = restore_optimizer(context.input(StageId("update", iteration - 1)), policy, optimizer, scaler)
    store: LayerStore = context.session.get("layer store", lambda: LayerStore(policy.device))
    longest = max(pack.num_tokens for batch in batches for pack in batch)
    plan = plan_update(policy, longest, update=update, optimizer=optimizer)
    options: dict[str, Any] = {"temperature": config.rollout.temperature, "plan": plan}

    def computed(pack: Pack, *, replay: bool, store: LayerStore | None = None) -> Scored:
        own: list[Tensor] | None = [] if replay else None
        found = completion_logprobs(policy, pack, store=store, replay_routes=replay, routes=own, **options)
        return Scored(*found, None if own is None else differing(pack, own))

    def score(pack: Pack, *, replay: bool = update.replay_routes) -> Scored:
        with torch.no_grad():
            return computed(pack, replay=replay)

    started = time.perf_counter()
    # The first batch is trained on by the very policy that would score it: that pass gives its old log-probabilities.
    old: list[list[Scored | None]] = [
        [score(pack) if index else None for pack in batch] for index, batch in enumerate(batches)
    ]
    reference = None
    if update.kl:
        with policy.adapter_disabled():
            reference = [[score(pack, replay=False).logprobs for pack in batch] for batch in batches]
    context.timings.append({"what": "score", "seconds": time.perf_counter() - started})

    started = time.perf_counter()
    # Neither this version nor the next until all is done: a retry in this process reads it back from disk.
    policy.version = -1
    rows: list[dict[str, Any]] = []
    for index, batch in enumerate(batches):
        rate = learning_rate_at(
            step, peak=update.learning_rate, warmup_steps=update.warmup_steps, schedule_steps=update.schedule_steps
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        figures = StepFigures(shape.num_hidden_layers)
        learned = [s for pack in batch for s in pack.samples if s.completion_id not in left_out]
        totals = StepTotals(
            num_completions=len(learned),
            num_tokens=sum(len(sample.completion_ids) for sample in learned),
            max_new_tokens=config.rollout.max_new_tokens,
        )
        for place, pack in enumerate(batch):
            engine = pack.engine_logprobs(policy.device)
            silent = all(sample.completion_id in left_out for sample in pack.samples)
            # Where nothing is to be learned no gradient comes of it.
            metrics = None
            if silent or (not update.kl and all(sample.advantage == 0 for sample in pack.samples)):
                before = old[index][place] or score(pack)
            else:
                now = computed(pack, replay=update.replay_routes, store=store)
                before = old[index][place] or now._replace(logprobs=now.logprobs.detach())
                inputs = LossInputs(
                    old_logprobs=before.logprobs,
                    engine_logprobs=engine,
                    reference_logprobs=reference[index][place] if reference else None,
                    advantages=pack.advantages(policy.device),
                    lengths=upload(pack.lengths, torch.int64, policy.device),
                )
                loss, metrics = policy_loss(now.logprobs, inputs, totals, update)
                scaler.scale(loss).backward()
            old[index][place] = before
            figures.add(pack, before, engine, metrics)
        parameters = [parameter for _, parameter in policy.parameters()]
        if figures.learned:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, update.max_grad_norm)
        if figures.learned:
            scaler.step(optimizer)
            scaler.update()
        grad_norm = float(norm)  # waits for the card, so it comes last; nothing is saved of a step that went wrong
        told = figures.read()
        checked = {"loss": told["loss"], "entropy": told["entropy"]}
        if not scaler.is_enabled():  # it skips a step without a finite gradient, and scales less from then on
            checked["gradient"] = grad_norm
        for name, value in checked.items():
            if not math.isfinite(value):
                raise UserError(f"the {name} of iteration {iteration}, step {index} is not finite", NOT_FINITE_HINT)
        rows.append(
            {
                "iteration": iteration,
                "step": step,
                "learning_rate": rate,
                **told,
                "kl": told["kl"] if update.kl else None,  # not measured without a reference
                "grad_norm": grad_norm,
                "zero_signal_groups": silent_groups,
            }
        )
        step += 1
        context.progress(index + 1, len(batches), "steps", entropy=round(told["entropy"], 3), grad=round(grad_norm, 3))
    warn_of_disagreement(iteration, max(row["engine_kl"] for row in rows), config)
    seconds = time.perf_counter() - started
    tokens = sum(len(sample.prompt_ids) + len(sample.completion_ids) for sample in samples)
    rate = tokens / max(seconds, 1e-9)
    context.timings.append({"what": "train", "seconds": seconds, "num_tokens": tokens, "tokens_per_s": rate})

    policy.version = iteration + 1
    policy.save_adapter(context.out)
    save_optimizer(context.out, policy, optimizer, step, scaler)
    write_parts(context.out, "metrics", rows, METRICS)
    write_parts(context.out, "samples", sample_rows(batches, old, reference, update, left_out), SAMPLES)


class StepFigures:
    """What is told of one optimizer step. It lies on the card until all of the step has been asked of it."""

    def __init__(self, num_layers: int) -> None:
        self._losses: list[Unread[LossMetrics]] = []
        self._num_layers = num_layers
        self._agreements: list[Unread[Agreement]] = []
        self._entropies: list[Tensor] = []
        self._differing: list[Tensor] = []
        self._routed = 0  # (token, layer) pairs

    @property
    def learned(self) -> bool:
        """Whether a pack had a loss, so that there is a gradient."""
        return bool(self._losses)

    def add(self, pack: Pack, scored: Scored, engine_logprobs: Tensor, loss: Unread[LossMetrics] | None) -> None:
        """A pack as the policy scored it before the iteration's first step, and its loss where it has one."""
        if loss is not None:
            self._losses.append(loss)
        self._agreements.append(Agreement.of(scored.logprobs, engine_logprobs))
        self._entropies.append(scored.entropy.sum())
        if scored.differing is not None:
            self._differing.append(scored.differing)
            self._routed += pack.num_tokens * self._num_layers

    def read(self) -> dict[str, Any]:
        """Columns of a row of metrics. Waits for the card."""
        total = sum((each.read() for each in self._losses), LossMetrics())
        agreement = sum((each.read() for each in self._agreements), Agreement())
        return {
            **total.means(),
            **agreement.means(),
            "tokens": total.tokens,
            "entropy": sum(map(float, self._entropies)) / agreement.tokens,
            "routes_differ": sum(map(int, self._differing)) / self._routed if self._routed else None,
        }


class Read(NamedTuple):
    """What an iteration left to learn from."""

    samples: list[Sample]  # in completion_id order
    silent_ids: set[str]  # the completions of groups without signal
    silent_groups: int


def read_samples(context: StageContext, iteration: int, *, top_k: int) -> Read:
    """The iteration's completions with their advantages. Rewards are first shaped by update.overlong_tokens.

    top_k: experts of a token in the recorded routes.
    """
    config = context.config
    rollouts = read_table(context.input(StageId("rollout", iteration)), "rollouts", ROLLOUTS).to_pylist()
    scores = read_table(context.input(StageId("score", iteration)), "scores", SCORES).select(
        ["completion_id", "reward"]
    )
    reward_of = {row["completion_id"]: row["reward"] for row in scores.to_pylist()}
    rollouts.sort(key=lambda row: row["completion_id"])
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rollouts:
        groups.setdefault(row["group_index"], []).append(row)
    rewards = torch.tensor(
        [[reward_of[row["completion_id"]] for row in group] for group in groups.values()], dtype=torch.float64
    )
    rewards += overlong_penalty(
        torch.tensor([[len(row["completion_ids"]) for row in group] for group in groups.values()]),
        max_new_tokens=config.rollout.max_new_tokens,
        overlong_tokens=config.update.overlong_tokens,
    )
    flat = advantages(rewards, scale=scale_of(config.update)).flatten().tolist()
    samples = [
        Sample(
            completion_id=row["completion_id"],
            prompt_ids=tuple(row["prompt_ids"]),
            completion_ids=tuple(row["completion_ids"]),
            engine_logprobs=tuple(row["engine_logprobs"]),
            advantage=advantage,
            routes=routes_of(row, top_k),
        )
        for row, advantage in zip(rollouts, flat, strict=True)
    ]
    silent = [group for group, heard in zip(groups.values(), signal(rewards).tolist(), strict=True) if not heard]
    return Read(samples, {row["completion_id"] for group in silent for row in group}, len(silent))


def routes_of(row: dict[str, Any], top_k: int) -> Tensor | None:
    """uint8 [prompt + completion - 1, layers, top_k] of a row of rollouts; None where none are recorded."""
    if row["routes"] is None:
        return None
    rows = len(row["prompt_ids"]) + len(row["completion_ids"]) - 1
    return torch.frombuffer(bytearray(row["routes"]), dtype=torch.uint8).view(rows, -1, top_k)


def differing(pack: Pack, own: list[Tensor]) -> Tensor:
    """int64 [], how many (token, layer) pairs each layer's `own` choice [T, k] sends elsewhere than was recorded."""
    recorded = pack.routes(own[0].device)
    assert recorded is not None
    counts = [other_experts(chosen, recorded[:, layer]).sum() for layer, chosen in enumerate(own)]
    return torch.stack(counts).sum()


def packed_batches(
    samples: Sequence[Sample], left_out: Collection[str], update: UpdateConfig, *, seed: int
) -> list[list[Pack]]:
    """The packs of each optimizer step; completions that are `left_out` share none with those that are learned from."""
    last = {index for index, sample in enumerate(samples) if sample.completion_id in left_out}
    return [
        [
            pack
            for part in ([i for i in order if i not in last], [i for i in order if i in last])
            for pack in deal_packs([samples[i] for i in sorted(part)], update.pack_tokens)
        ]
        for order in deal(len(samples), update.steps, seed=seed, last=last)
    ]


def deal(count: int, steps: int, *, seed: int, last: Collection[int] = ()) -> list[list[int]]:
    """Indices 0..count-1, shuffled by `seed`, dealt into `steps` batches whose sizes differ by at most one.

    Those in `last` are dealt after the others, so that these too are spread evenly.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    order.sort(key=lambda index: index in last)
    return [order[start::steps] for start in range(min(steps, count))]


def warn_of_disagreement(iteration: int, engine_kl: float, config: RunConfig) -> None:
    """One line in the log, with the cure, where the engine sampled from another policy than the trainer's."""
    if not engine_kl <= MAX_ENGINE_KL:
        if config.update.correction == "none":
            cure = "update.correction=truncated"
        elif not config.update.replay_routes:
            cure = "update.replay_routes=true"
        else:
            cure = f"model.dtype={'float16' if config.model.dtype == 'bfloat16' else 'float32'}"
        log.warning(
            f"iteration {iteration}: engine and trainer disagree, engine_kl {engine_kl:.2g} is above {MAX_ENGINE_KL}; "
            f'try {cure}, see "When engine and trainer disagree" in README.md'
        )


def sample_rows(
    batches: list[list[Pack]],
    old: list[list[Scored | None]],
    reference: list[list[Tensor]] | None,
    update: UpdateConfig,
    left_out: Collection[str],
) -> list[dict[str, Any]]:
    """What each completion was trained with, in completion_id order."""
    rows = []
    for index, batch in enumerate(batches):
        for place, pack in enumerate(batch):
            scored = old[index][place]
            assert scored is not None
            lengths = pack.lengths
            engine = pack.engine_logprobs(scored.logprobs.device)
            corrected = correction(scored.logprobs, engine, kind=update.correction, cap=update.correction_cap)
            policy_of = scored.logprobs.split(lengths)
            reference_of = reference[index][place].split(lengths) if reference else None
            weights_of = corrected.weights.split(lengths) if corrected else None
            for row, sample in enumerate(pack.samples):
                weights = weights_of[row].tolist() if weights_of else None
                learned = sample.completion_id not in left_out
                rows.append(
                    {
                        "completion_id": sample.completion_id,
                        "advantage": sample.advantage,
                        "loss_mask": [learned and weight > 0 for weight in weights or [1.0] * lengths[row]],
                        "policy_logprobs": policy_of[row].tolist(),
                        "reference_logprobs": reference_of[row].tolist() if reference_of else None,
                        "importance_weights": weights,
                    }
                )
    return sorted(rows, key=lambda row: row["completion_id"])


def main() -> None:
    command_main("update", run)


if __name__ == "__main__":
    main()
