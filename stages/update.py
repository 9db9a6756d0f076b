"""update: `update.loss` on the adapter, from the completions and rewards of one iteration.

    python -m stages.update --run-dir R --iteration 3

Writes the checkpoint (adapter in PEFT's layout, optimizer.safetensors, state.json: what the next update goes on from),
metrics.parquet (one row an optimizer step) and samples.parquet (what each completion was trained with). The completions
are dealt into `update.steps` batches; each is one optimizer step, its gradient accumulated over micro-batches. What a
loss leaves out (dapo: groups without signal) is scored like the rest and takes no part in a step.
"""

import json
import logging
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.artifacts import StageContext, StageId, derive
from stages.artifacts.command import main as command_main
from stages.artifacts.parquet import METRICS, ROLLOUTS, SAMPLES, SCORES, read_table, write_parts
from stages.config import UpdateConfig, UserError
from stages.grpo import (
    LOSSES,
    Agreement,
    LossInputs,
    LossMetrics,
    StepTotals,
    advantages,
    correction,
    learning_rate_at,
    overlong_penalty,
    policy_loss,
    scale_of,
    signal,
)
from stages.kernels.logprobs import token_logprobs
from stages.model.policy import Policy, live_policy

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of a parameter
MAX_ENGINE_KL = 0.01  # nats a token; others accept 0.002 to 0.015 for mixtures of experts in bf16


class Sample(NamedTuple):
    """One completion as the update sees it."""

    completion_id: str
    prompt_ids: list[int]
    completion_ids: list[int]
    engine_logprobs: list[float]
    advantage: float


class Logprobs(NamedTuple):
    """Of the completion tokens of a micro-batch, one completion after the other, float32 [T]."""

    logprobs: Tensor
    entropy: Tensor


def run(context: StageContext) -> None:
    """Trains the policy of version `context.stage.index` one version on."""
    config, iteration = context.config, context.stage.index
    assert iteration is not None
    update = config.update
    policy = live_policy(context, iteration)
    samples, silent_ids, silent_groups = read_samples(context, iteration)
    left_out = silent_ids if LOSSES[update.loss].drops_silent_groups else set()
    optimizer = make_optimizer(policy, update)
    step = 0
    if iteration > 0:
        step = restore_optimizer(context.input(StageId("update", iteration - 1)), policy, optimizer)

    started = time.perf_counter()
    temperature = config.rollout.temperature
    last = {i for i, sample in enumerate(samples) if sample.completion_id in left_out}
    batches = [
        [
            micro
            for part in ([i for i in order if i not in last], [i for i in order if i in last])
            for micro in micro_batches([samples[i] for i in part], update.micro_batch)
        ]
        for order in deal(len(samples), update.steps, seed=derive("deal", config.train.seed, iteration), last=last)
    ]
    # The first batch is trained on by the very policy that would score it: that pass gives its old log-probabilities.
    old: list[list[Logprobs | None]] = [
        [score(policy, micro, temperature) if index else None for micro in batch] for index, batch in enumerate(batches)
    ]
    reference = None
    if update.kl:
        with policy.adapter_disabled():
            reference = [[score(policy, micro, temperature).logprobs for micro in batch] for batch in batches]
    context.timings.append({"what": "score", "seconds": time.perf_counter() - started})

    started = time.perf_counter()
    policy.version = (
        -1
    )  # neither this version nor the next until all is done: a retry in this process reads it back from disk
    rows: list[dict[str, Any]] = []
    for index, batch in enumerate(batches):
        rate = learning_rate_at(
            step, peak=update.learning_rate, warmup_steps=update.warmup_steps, schedule_steps=update.schedule_steps
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        total, agreement, entropy = LossMetrics(), Agreement(), 0.0
        learned = [s for micro in batch for s in micro if s.completion_id not in left_out]
        totals = StepTotals(
            num_completions=len(learned),
            num_tokens=sum(len(sample.completion_ids) for sample in learned),
            max_new_tokens=config.rollout.max_new_tokens,
        )
        for place, micro in enumerate(batch):
            engine = engine_logprobs(micro, policy.device)
            silent = all(sample.completion_id in left_out for sample in micro)
            if silent or (not update.kl and all(sample.advantage == 0 for sample in micro)):  # no gradient comes of it
                before = old[index][place] or score(policy, micro, temperature)
            else:
                now = completion_logprobs(policy, micro, temperature)
                before = old[index][place] or Logprobs(now.logprobs.detach(), now.entropy)
                inputs = LossInputs(
                    old_logprobs=before.logprobs,
                    engine_logprobs=engine,
                    reference_logprobs=reference[index][place] if reference else None,
                    advantages=torch.tensor([sample.advantage for sample in micro], device=policy.device),
                    lengths=torch.tensor([len(sample.completion_ids) for sample in micro], device=policy.device),
                )
                loss, metrics = policy_loss(now.logprobs, inputs, totals, update)
                loss.backward()
                total = total + metrics
            old[index][place] = before
            agreement = agreement + Agreement.of(before.logprobs, engine)
            entropy += float(before.entropy.sum())
        parameters = [parameter for _, parameter in policy.parameters()]
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, update.max_grad_norm))
        if not torch.isfinite(torch.tensor(grad_norm)):
            raise UserError(
                f"the gradient of iteration {iteration}, step {index} is not finite",
                "lower update.learning_rate, or use model.dtype=float32 or bfloat16; the last good checkpoint is kept",
            )
        if total.tokens:
            optimizer.step()
        entropy /= agreement.tokens
        means = total.means()
        rows.append(
            {
                "iteration": iteration,
                "step": step,
                "learning_rate": rate,
                **means,
                "kl": means["kl"] if update.kl else None,  # not measured without a reference
                **agreement.means(),
                "entropy": entropy,
                "grad_norm": grad_norm,
                "zero_signal_groups": silent_groups,
                "tokens": total.tokens,
            }
        )
        step += 1
        context.progress(index + 1, len(batches), "steps", entropy=round(entropy, 3), grad=round(grad_norm, 3))
    warn_of_disagreement(iteration, max(row["engine_kl"] for row in rows), update.correction)
    seconds = time.perf_counter() - started
    tokens = sum(len(sample.prompt_ids) + len(sample.completion_ids) for sample in samples)
    rate = tokens / max(seconds, 1e-9)
    context.timings.append({"what": "train", "seconds": seconds, "num_tokens": tokens, "tokens_per_s": rate})

    policy.version = iteration + 1
    policy.save_adapter(context.out)
    save_optimizer(context.out, policy, optimizer, step)
    write_parts(context.out, "metrics", rows, METRICS)
    write_parts(context.out, "samples", sample_rows(batches, old, reference, update, left_out), SAMPLES)


class Read(NamedTuple):
    """What an iteration left to learn from."""

    samples: list[Sample]  # in completion_id order
    silent_ids: set[str]  # the completions of groups without signal
    silent_groups: int


def read_samples(context: StageContext, iteration: int) -> Read:
    """The iteration's completions with their advantages. Rewards are first shaped by update.overlong_tokens."""
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
        Sample(row["completion_id"], row["prompt_ids"], row["completion_ids"], row["engine_logprobs"], advantage)
        for row, advantage in zip(rollouts, flat, strict=True)
    ]
    silent = [group for group, heard in zip(groups.values(), signal(rewards).tolist(), strict=True) if not heard]
    return Read(samples, {row["completion_id"] for group in silent for row in group}, len(silent))


def deal(count: int, steps: int, *, seed: int, last: Collection[int] = ()) -> list[list[int]]:
    """Indices 0..count-1, shuffled by `seed`, dealt into `steps` batches whose sizes differ by at most one.

    Those in `last` are dealt after the others, so that these too are spread evenly.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    order.sort(key=lambda index: index in last)
    return [order[start::steps] for start in range(min(steps, count))]


def micro_batches(samples: list[Sample], size: int) -> Iterator[list[Sample]]:
    """`samples` from the shortest to the longest, `size` at a time, so that padding is small."""
    ordered = sorted(samples, key=lambda s: (len(s.prompt_ids) + len(s.completion_ids), s.completion_id))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def completion_mask(micro: list[Sample], device: torch.device) -> Tensor:
    """True on the completion's tokens, bool [N, T] of the longest completion's length."""
    lengths = torch.tensor([len(sample.completion_ids) for sample in micro], device=device)
    return torch.arange(int(lengths.max()), device=device) < lengths[:, None]


def completion_logprobs(policy: Policy, micro: list[Sample], temperature: float) -> Logprobs:
    """The policy's own view of a micro-batch's completions, with gradients.

    Rows are padded on the right, where a causal model never looks; only the positions that predict a completion's token
    reach the unembedding.
    """
    device = policy.device
    lengths = [len(sample.prompt_ids) + len(sample.completion_ids) for sample in micro]
    ids = torch.zeros(len(micro), max(lengths), dtype=torch.int64)
    for row, sample in enumerate(micro):
        ids[row, : lengths[row]] = torch.tensor(sample.prompt_ids + sample.completion_ids)
    positions = torch.arange(ids.shape[1], device=device).expand(ids.shape)
    hidden = policy.model.model(
        inputs_embeds=policy.embed(ids.to(device)), position_ids=positions, use_cache=False
    ).last_hidden_state
    mask = completion_mask(micro, device)
    rows, tokens = torch.where(mask)
    starts = torch.tensor([len(sample.prompt_ids) for sample in micro], device=device)
    predicting = hidden[rows, starts[rows] + tokens - 1]
    targets = torch.tensor([token for sample in micro for token in sample.completion_ids], device=device)
    logprobs, entropy = token_logprobs(predicting, policy.model.lm_head.weight, targets, temperature=temperature)
    return Logprobs(logprobs, entropy)


@torch.no_grad()
def score(policy: Policy, micro: list[Sample], temperature: float) -> Logprobs:
    """`completion_logprobs` without gradients; the same shapes, so on the CPU the same bits."""
    return completion_logprobs(policy, micro, temperature)


def engine_logprobs(micro: list[Sample], device: torch.device) -> Tensor:
    """What the engine made of the same tokens, float32 [T]."""
    return torch.tensor([x for sample in micro for x in sample.engine_logprobs], device=device)


def warn_of_disagreement(iteration: int, engine_kl: float, chosen: str) -> None:
    """One line in the log, with the cure, where the engine sampled from another policy than the trainer's."""
    if not engine_kl <= MAX_ENGINE_KL:
        cure = "update.replay_routes=true" if chosen != "none" else "update.correction=truncated"
        log.warning(
            f"iteration {iteration}: engine and trainer disagree, engine_kl {engine_kl:.2g} is above {MAX_ENGINE_KL}; "
            f'try {cure}, see "When engine and trainer disagree" in README.md'
        )


def make_optimizer(policy: Policy, update: UpdateConfig) -> torch.optim.AdamW:
    """AdamW over the adapter."""
    parameters = [parameter for _, parameter in policy.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return torch.optim.AdamW(parameters, lr=update.learning_rate, weight_decay=update.weight_decay, foreach=False)


def save_optimizer(folder: Path, policy: Policy, optimizer: torch.optim.AdamW, step: int) -> None:
    """Writes AdamW's moments beside the adapter, and in state.json what they belong to.

    There is no generator state to keep: what is random in an update is derived from the seed and the iteration.
    """
    tensors = {
        f"{name}.{moment}": optimizer.state[parameter][moment].detach().cpu().contiguous()
        for name, parameter in policy.parameters()
        for moment in MOMENTS
        if parameter in optimizer.state
    }
    save_file(tensors, folder / "optimizer.safetensors")
    state = {"policy_version": policy.version, "optimizer_steps": step}
    (folder / "state.json").write_text(json.dumps(state, sort_keys=True) + "\n")


def restore_optimizer(folder: Path, policy: Policy, optimizer: torch.optim.AdamW) -> int:
    """Puts back what `save_optimizer` wrote; returns how many optimizer steps there have been."""
    tensors = load_file(folder / "optimizer.safetensors")
    for name, parameter in policy.parameters():
        if f"{name}.step" in tensors:
            moments = {moment: tensors[f"{name}.{moment}"] for moment in MOMENTS}
            optimizer.state[parameter] = {
                moment: value if moment == "step" else value.to(parameter.device) for moment, value in moments.items()
            }
    return int(json.loads((folder / "state.json").read_text())["optimizer_steps"])


def sample_rows(
    batches: list[list[list[Sample]]],
    old: list[list[Logprobs | None]],
    reference: list[list[Tensor]] | None,
    update: UpdateConfig,
    left_out: Collection[str],
) -> list[dict[str, Any]]:
    """What each completion was trained with, in completion_id order."""
    rows = []
    for index, batch in enumerate(batches):
        for place, micro in enumerate(batch):
            scored = old[index][place]
            assert scored is not None
            lengths = [len(sample.completion_ids) for sample in micro]
            engine = engine_logprobs(micro, scored.logprobs.device)
            corrected = correction(scored.logprobs, engine, kind=update.correction, cap=update.correction_cap)
            policy_of = scored.logprobs.split(lengths)
            reference_of = reference[index][place].split(lengths) if reference else None
            weights_of = corrected.weights.split(lengths) if corrected else None
            for row, sample in enumerate(micro):
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
