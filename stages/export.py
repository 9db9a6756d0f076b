"""export: the trained policy as a model folder that transformers loads.

    python -m stages.export --run-dir R --format mxfp4

Formats: mxfp4 (experts without a delta keep their bytes, the others are re-quantised), fp16 and bf16 (dense, merged),
adapter (PEFT). Whatever was written is loaded again: by transformers, whose logits must equal ours on the same tensors,
and as a policy whose programs meet the same held-out seeds as the last evaluation's. Re-quantising can swallow small
deltas: when less than 90 % of the gain is left, export.json says so and the rest is kept as a low-rank residual adapter
beside the model, in residual_adapter/.

Does not cover: sharded reload checks on a card that cannot hold the model twice.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.artifacts import StageContext, StageId, derive
from stages.artifacts.command import main as command_main
from stages.artifacts.parquet import SUMMARY, read_table
from stages.config import UserError
from stages.engine import Completion, Engine, Request, SamplingParams
from stages.model.checkpoint import Checkpoint, locate
from stages.model.gpt_oss import build
from stages.model.merge import FORMATS, copy_tokenizer, set_residual, write_merged
from stages.model.policy import Policy, live_policy
from stages.tasks import judging, registry

GAIN_KEPT = 0.9  # of the held-out gain; less and the residual adapter is written
NUM_PROBES = 8  # completions of the live policy on which logits and KL are compared
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}  # float32: largest difference; 16-bit: relative norm


def run(context: StageContext) -> None:
    """Writes the model folder and export.json. Raises UserError when what transformers loads is not what we hold."""
    config, updates, format = context.config, context.stage.index, context.stage.label
    assert updates is not None
    policy = live_policy(context, updates)
    checkpoint = Checkpoint(locate(config.model.source))
    probes = sample(policy, context, count=NUM_PROBES, prefix="probe")
    live = [log_distributions(policy.model, probe) for probe in probes]
    started = time.perf_counter()
    body: dict[str, Any] = {"format": format, "policy_version": updates}
    if format == "adapter":
        policy.save_adapter(context.out)
        copy_tokenizer(checkpoint.folder, context.out)
        body["reload"] = check_adapter(context.out, checkpoint, probes, live)
    else:
        lost = write_merged(policy, checkpoint, context.out, format=format)
        body["requantized"] = [each._asdict() for each in lost]
        body["reload"] = check_model(context.out, format, probes)
    context.timings.append({"what": "write", "seconds": time.perf_counter() - started})
    if format != "adapter":
        body |= judge_export(context, policy, checkpoint, probes, live)
    (context.out / "export.json").write_text(json.dumps(body, indent=2, sort_keys=True) + "\n")
    context.progress(1, 1, "model", **{"gain kept": f"{body['gain_kept']:.0%}"} if body.get("gain_kept") else {})


def judge_export(
    context: StageContext, policy: Policy, checkpoint: Checkpoint, probes: list[Completion], live: list[Tensor]
) -> dict[str, Any]:
    """What the exported model still can: its KL to the live policy, its held-out score, the share of the gain kept."""
    config = context.config
    before, after = (evaluated_score(context, index) for index in (0, policy.version))
    exported = Policy.load(
        dataclasses.replace(config.model, source=str(context.out)),
        lora_rank=config.update.lora_rank,
        lora_alpha=config.update.lora_alpha,
        seed=config.train.seed,
        also_train=config.update.also_train,
    )
    body: dict[str, Any] = {
        "kl_to_live": kl(live, [log_distributions(exported.model, probe) for probe in probes]),
        "score_untrained": before,
        "score_live": after,
        "score_exported": held_out_score(exported, context),
    }
    body["gain_kept"] = kept(before, after, body["score_exported"])
    if body["gain_kept"] is not None and body["gain_kept"] < GAIN_KEPT:
        set_residual(policy, exported, checkpoint, Checkpoint(context.out))
        exported.source = "."
        folder = context.out / "residual_adapter"
        folder.mkdir()
        exported.save_adapter(folder)
        body["kl_with_residual"] = kl(live, [log_distributions(exported.model, probe) for probe in probes])
        body["score_with_residual"] = held_out_score(exported, context)
        body["gain_kept_with_residual"] = kept(before, after, body["score_with_residual"])
    return body


def kept(before: float, after: float, exported: float) -> float | None:
    """The share of the gain that is left; None when training gained nothing."""
    return (exported - before) / (after - before) if after > before else None


def sample(policy: Policy, context: StageContext, *, count: int, prefix: str) -> list[Completion]:
    """`count` completions, sampled with the seeds of the evaluation's first ones."""
    config = context.config
    task = registry.get(config.task.name, config.task.option_values())
    (prompt,) = task.prompts(1, 0, config.train.seed)
    prompt_ids = policy.render(prompt.messages)
    requests = [
        Request(
            completion_id=f"{prefix}-{number:04d}",
            prompt_ids=prompt_ids,
            sampling=SamplingParams(
                max_new_tokens=config.rollout.max_new_tokens,
                temperature=config.rollout.temperature,
                stop_token_ids=policy.stop_token_ids,
                seed=derive("evaluate", config.train.seed, number),
            ),
        )
        for number in range(count)
    ]
    rollout = config.rollout
    engine = Engine(
        policy,
        max_slots=rollout.max_slots,
        max_new_tokens=rollout.max_new_tokens,
        cache_bytes=rollout.cache_bytes,
    )
    return engine.run(requests)


def held_out_score(policy: Policy, context: StageContext) -> float:
    """The task's first figure, averaged over the policy's programs on the seeds that the evaluations judge them on."""
    config = context.config
    task = registry.get(config.task.name, config.task.option_values())
    completions = sample(policy, context, count=config.evaluate.programs, prefix="export")
    programs = [task.extract(policy.decode(completion.completion_ids)) for completion in completions]
    limits = judging.limits_of(config.sandbox)
    pool = judging.sandbox_of(context, task)
    scores = judging.play_held_out(programs, task=task, pool=pool, limits=limits, games=config.evaluate.games)
    figure = task.figures[0].name
    return sum(judging.figures([score], task=task)[figure] for score in scores) / len(scores)


def evaluated_score(context: StageContext, updates: int) -> float:
    """The policy's first figure in the evaluation after `updates` updates."""
    task = registry.get(context.config.task.name, context.config.task.option_values())
    rows = read_table(context.input(StageId("evaluate", updates)), "summary", SUMMARY).to_pylist()
    return float(next(row[task.figures[0].name] for row in rows if row["kind"] == "policy"))


@torch.no_grad()
def logits_of(model: Any, probe: Completion) -> Tensor:
    """Logits float32 [T, V] that predict the probe's completion."""
    device = model.lm_head.weight.device
    ids = torch.tensor([probe.prompt_ids + probe.completion_ids], device=device)
    return model(ids, use_cache=False).logits[0, len(probe.prompt_ids) - 1 : -1].float().cpu()


def log_distributions(model: Any, probe: Completion) -> Tensor:
    """Log-probabilities float32 [T, V] that predict the probe's completion."""
    return logits_of(model, probe).log_softmax(-1)


def kl(live: list[Tensor], other: list[Tensor]) -> float:
    """Mean exact KL(live || other) a token, in nats, over the probes."""
    sums = [float((mine.exp() * (mine - theirs)).sum()) for mine, theirs in zip(live, other, strict=True)]
    return sum(sums) / sum(len(mine) for mine in live)


def check_model(folder: Path, format: str, probes: list[Completion]) -> dict[str, float]:
    """Loads the folder with transformers and with ours, in float32 and in its own type, and compares the logits."""
    from transformers import AutoModelForCausalLM

    figures = {}
    for dtype in dict.fromkeys((FORMATS[format], torch.float32)):
        name = str(dtype).removeprefix("torch.")
        theirs: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=FORMATS[format])
        if dtype != FORMATS[format]:
            theirs.to(dtype)  # widened only: casting to 16 bits would round RoPE's frequencies, which stay float32
        theirs.eval()
        ours = build(Checkpoint(folder), experts="dequantized", dtype=dtype, device=theirs.device)
        figures[name] = difference([(logits_of(ours, p), logits_of(theirs, p)) for p in probes], name)
    return figures


def check_adapter(
    folder: Path, checkpoint: Checkpoint, probes: list[Completion], live: list[Tensor]
) -> dict[str, float]:
    """Loads the folder with transformers and with ours, in float32 and in its own type; compares the logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, attn_implementation="eager", dtype=torch.bfloat16
    )
    theirs = PeftModel.from_pretrained(base.to(torch.float32), folder).eval()
    pairs = [(mine, log_distributions(theirs, probe)) for mine, probe in zip(live, probes, strict=True)]
    return {"float32": difference(pairs, "float32")}


def difference(pairs: list[tuple[Tensor, Tensor]], dtype: str) -> float:
    """How far our logits and transformers' lie apart: the largest difference in float32, a relative norm in 16 bits."""
    if dtype == "float32":
        found = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    else:
        squares = sum(float((ours - theirs).square().sum()) for ours, theirs in pairs)
        found = (squares / sum(float(theirs.square().sum()) for _, theirs in pairs)) ** 0.5
    if not found <= TOLERANCE[dtype]:
        raise UserError(
            f"transformers' {dtype} logits of the export differ from ours by {found:.2g}, allowed {TOLERANCE[dtype]}",
            "this is a fault of flexsink or of the installed transformers: please report both versions",
        )
    return found


def main() -> None:
    command_main("export", run)


if __name__ == "__main__":
    main()
