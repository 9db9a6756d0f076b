"""export: the trained policy as a model folder that transformers loads.

    python -m stages.export --run-dir R --format mxfp4

Formats: mxfp4 (experts without a delta keep their bytes, the others are re-quantised), fp16 and bf16 (dense, merged),
adapter (PEFT). Whatever was written is loaded again. By transformers on the CPU, whose logits must equal ours on the
same tensors, of as many layers as the host's memory holds (`reloaded_layers` in export.json). And on the card, in
the live policy's place, as a policy whose programs meet the same held-out seeds as the last evaluation's; a dense model
that does not fit there is not judged, which `not_judged` says. Re-quantising can swallow small deltas: when less than
90 % of the gain is left, export.json says so and the rest is kept as a low-rank residual adapter beside the model, in
residual_adapter/.
"""

import contextlib
import dataclasses
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.artifacts import StageContext, StageId, derive
from stages.artifacts.command import main as command_main
from stages.artifacts.parquet import SUMMARY, read_table
from stages.config import UpdateConfig, UserError
from stages.engine import Completion, Engine, Request, engine_of, live_engine, sampling_of
from stages.model import lora
from stages.model.checkpoint import Checkpoint, locate
from stages.model.excerpt import excerpt, layers_in_memory
from stages.model.full_weights import FullWeights
from stages.model.gpt_oss import build
from stages.model.merge import FORMATS, Changes, Requantized, copy_tokenizer, set_residual, write_merged
from stages.model.policy import Policy, live_policy
from stages.tasks import judging, registry
from stages.trainer import Pack, Sample, completion_distributions

GAIN_KEPT = 0.9  # of the held-out gain; less and the residual adapter is written
NUM_PROBES, PROBE_TOKENS = 8, 128  # completions of the live policy, cut off, on which KL is measured
NUM_RELOADED = 2  # of those, on which logits are compared, as that is done on the CPU
CARD_SHARE = 0.8  # of a card's free memory, what the weights of a model to be judged may take
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}  # of two models' logits of a token, relative norm


class Written(NamedTuple):
    """What is left of the live policy once the model is written; all on the CPU."""

    probes: list[Sample]
    live: list[Tensor]  # its log-probabilities of each probe, for a model that is judged; none for an adapter
    changes: Changes
    lost: list[Requantized]


def run(context: StageContext) -> None:
    """Writes the model folder and export.json. Raises UserError when what transformers loads is not what we hold."""
    config, updates, format = context.config, context.stage.index, context.stage.label
    assert updates is not None
    checkpoint = Checkpoint(locate(config.model.source))
    written = write(context, checkpoint, updates, format)
    # The card need not hold two models: what comes after has the live policy's place.
    for name in ("engine", "policy"):
        context.session.drop(name)
    gc.collect()
    torch.cuda.empty_cache()

    body: dict[str, Any] = {"format": format, "policy_version": updates}
    parts = 2 if format == "adapter" else 3  # written, loaded by transformers, judged
    context.progress(1, parts, "parts")
    body |= reloaded(context, checkpoint, format, written.probes[:NUM_RELOADED])
    context.progress(2, parts, "parts")
    if format != "adapter":
        body["requantized"] = [each._asdict() for each in written.lost]
        body |= judge_export(context, checkpoint, written)
    (context.out / "export.json").write_text(json.dumps(body, indent=2, sort_keys=True) + "\n")
    told = {"gain kept": f"{body['gain_kept']:.0%}"} if body.get("gain_kept") else {}
    context.progress(parts, parts, "parts", **told)


def write(context: StageContext, checkpoint: Checkpoint, updates: int, format: str) -> Written:
    """Writes the live policy in that format, and notes what it says of completions of its own."""
    policy = live_policy(context, updates)
    completions = sample(live_engine(context, policy), context, count=NUM_PROBES, prefix="probe")
    probes = [
        Sample(each.completion_id, each.prompt_ids, each.completion_ids[:PROBE_TOKENS], (), 0.0) for each in completions
    ]
    started = time.perf_counter()
    live: list[Tensor] = []
    lost: list[Requantized] = []
    if format == "adapter":
        policy.save_adapter(context.out)
        copy_tokenizer(checkpoint.folder, context.out)
    else:
        lost = write_merged(policy, checkpoint, context.out, format=format)
    context.timings.append({"what": "write", "seconds": time.perf_counter() - started})
    if format != "adapter":
        live = distributions(policy, probes)
    return Written(probes, live, Changes.of(policy), lost)


def reloaded(context: StageContext, checkpoint: Checkpoint, format: str, probes: list[Sample]) -> dict[str, Any]:
    """How far transformers' logits of what was written lie from ours, and of how many layers."""
    started = time.perf_counter()
    num_layers = checkpoint.config.num_hidden_layers
    layers = layers_in_memory(checkpoint.config, itemsize=4)
    body: dict[str, Any] = {"reloaded_layers": layers, "reload": {}}
    if layers:
        with tempfile.TemporaryDirectory(dir=context.out) as temporary:

            def part(folder: Path) -> Path:
                return folder if layers == num_layers else excerpt(folder, layers, Path(temporary) / folder.name)

            if format == "adapter":
                base = part(checkpoint.folder)
                body["reload"] = check_adapter(part(context.out), base, probes, context.config.update)
            else:
                body["reload"] = check_model(part(context.out), format, probes)
    context.timings.append({"what": "reload", "seconds": time.perf_counter() - started})
    return body


def judge_export(context: StageContext, checkpoint: Checkpoint, written: Written) -> dict[str, Any]:
    """What the exported model still can: its KL to the live policy, its held-out score, the share of the gain kept."""
    config, updates = context.config, context.stage.index
    assert updates is not None
    before, after = (evaluated_score(context, index) for index in (0, updates))
    body: dict[str, Any] = {"score_untrained": before, "score_live": after}
    if reason := too_large(context.out):
        return body | {"not_judged": reason}
    exported = Policy.load(
        dataclasses.replace(config.model, source=str(context.out)),
        lora_rank=config.update.lora_rank,
        lora_alpha=config.update.lora_alpha,
        seed=config.train.seed,
        lora_dtype=config.update.lora_dtype,
        also_train=config.update.also_train,
    )
    body["kl_to_live"] = kl(written.live, distributions(exported, written.probes))
    body["score_exported"] = held_out_score(exported, context)
    body["gain_kept"] = kept(before, after, body["score_exported"])
    if body["gain_kept"] is not None and body["gain_kept"] < GAIN_KEPT:
        set_residual(written.changes, exported, checkpoint, Checkpoint(context.out))
        exported.source = "."
        folder = context.out / "residual_adapter"
        folder.mkdir()
        exported.save_adapter(folder)
        body["kl_with_residual"] = kl(written.live, distributions(exported, written.probes))
        body["score_with_residual"] = held_out_score(exported, context)
        body["gain_kept_with_residual"] = kept(before, after, body["score_with_residual"])
    return body


def too_large(folder: Path) -> str:
    """Why the model in `folder` cannot be put on the card; empty where it can, and without a card."""
    if not torch.cuda.is_available():
        return ""
    needed, (free, _) = sum(path.stat().st_size for path in folder.glob("*.safetensors")), torch.cuda.mem_get_info()
    packed = Checkpoint(folder).mxfp4  # as large as what was there before, which may keep its embedding elsewhere
    return "" if packed or needed <= CARD_SHARE * free else f"{needed / 1e9:.1f} GB do not fit {free / 1e9:.1f} GB"


def kept(before: float, after: float, exported: float) -> float | None:
    """The share of the gain that is left; None when training gained nothing."""
    return (exported - before) / (after - before) if after > before else None


def sample(engine: Engine, context: StageContext, *, count: int, prefix: str) -> list[Completion]:
    """`count` completions, sampled with the seeds of the evaluation's first ones."""
    config, policy = context.config, engine.policy
    task = registry.of(config)
    (prompt,) = task.prompts(1, 0, config.train.seed)
    prompt_ids = policy.render(prompt.messages)
    requests = [
        Request(
            completion_id=f"{prefix}-{number:04d}",
            prompt_ids=prompt_ids,
            sampling=sampling_of(config, policy, seed=derive("evaluate", config.train.seed, number)),
        )
        for number in range(count)
    ]
    return engine.run(requests)


def held_out_score(policy: Policy, context: StageContext) -> float:
    """The task's first figure, averaged over the policy's programs on the seeds that the evaluations judge them on."""
    config = context.config
    task = registry.of(config)
    with contextlib.closing(engine_of(config, policy)) as engine:
        completions = sample(engine, context, count=config.evaluate.programs, prefix="export")
    programs = [task.extract(policy.decode(completion.completion_ids)) for completion in completions]
    limits = judging.limits_of(config.sandbox)
    pool = judging.sandbox_of(context, task)
    scores = judging.play_held_out(programs, task=task, pool=pool, limits=limits, games=config.evaluate.games)
    figure = task.figures[0].name
    return sum(judging.figures([score], task=task)[figure] for score in scores) / len(scores)


def evaluated_score(context: StageContext, updates: int) -> float:
    """The policy's first figure in the evaluation after `updates` updates."""
    task = registry.of(context.config)
    rows = read_table(context.input(StageId("evaluate", updates)), "summary", SUMMARY).to_pylist()
    return float(next(row[task.figures[0].name] for row in rows if row["kind"] == "policy"))


def distributions(policy: Policy, probes: list[Sample]) -> list[Tensor]:
    """Log-probabilities float32 [T, V] that predict each probe's completion."""
    return [completion_distributions(policy, Pack((probe,))) for probe in probes]


@torch.no_grad()
def logits_of(model: Any, probes: list[Sample]) -> list[Tensor]:
    """Logits float32 [T, V] that predict each probe's completion."""
    found: list[Tensor] = []
    for probe in probes:
        ids = torch.tensor([probe.prompt_ids + probe.completion_ids])
        found.append(model(ids, use_cache=False).logits[0, len(probe.prompt_ids) - 1 : -1].float())
    return found


def kl(live: list[Tensor], other: list[Tensor]) -> float:
    """Mean exact KL(live || other) a token, in nats, over the probes."""
    sums = [float((mine.exp() * (mine - theirs)).sum()) for mine, theirs in zip(live, other, strict=True)]
    return sum(sums) / sum(len(mine) for mine in live)


def check_model(folder: Path, format: str, probes: list[Sample]) -> dict[str, float]:
    """Loads the folder with transformers and with ours, in float32 and in its own type, and compares the logits.

    In 16 bits the two may lie apart by twice what rounding alone moves transformers' logits: where many layers route
    by a rounded stream, no fixed bound holds.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=FORMATS[format])
    theirs = {FORMATS[format]: logits_of(model.eval(), probes)}
    model.to(torch.float32)  # widened only: casting to 16 bits would round RoPE's frequencies, which stay float32
    theirs[torch.float32] = logits_of(model, probes)
    del model  # before ours is made: the host need not hold two
    figures = {}
    for dtype, logits in theirs.items():
        ours = build(Checkpoint(folder), experts="dequantized", dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        figures[name] = agreed(logits_of(ours, probes), logits, name, rounding=apart(logits, theirs[torch.float32]))
        del ours
    return figures


def check_adapter(folder: Path, base: Path, probes: list[Sample], update: UpdateConfig) -> dict[str, float]:
    """Loads base model and adapter with transformers and PEFT and with ours, in float32, and compares the logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base_model: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.bfloat16)
    theirs = logits_of(PeftModel.from_pretrained(base_model.to(torch.float32), folder).eval(), probes)
    del base_model  # before ours is made: the host need not hold two
    ours = build(Checkpoint(base), experts="dequantized", dtype=torch.float32)
    lora.add_lora(ours, rank=update.lora_rank, alpha=update.lora_alpha, dtype=torch.float32, seed=0)
    full_weights = FullWeights(ours, update.also_train)
    lora.load_adapter(lora.lora_parameters(ours) + full_weights.parameters(), folder)
    return {"float32": agreed(logits_of(ours, probes), theirs, "float32", rounding=0.0)}


def agreed(ours: list[Tensor], theirs: list[Tensor], dtype: str, *, rounding: float) -> float:
    """How far our logits and transformers' lie apart; UserError when that is more than twice what rounding does."""
    found, allowed = apart(ours, theirs), max(TOLERANCE[dtype], 2 * rounding)
    if not found <= allowed:
        raise UserError(
            f"transformers' {dtype} logits of the export differ from ours by {found:.2g}, allowed {allowed:.2g}",
            "this is a fault of flexsink or of the installed transformers: please report both versions",
        )
    return found


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The norm of the difference of a token's logits, relative to theirs: of nine tokens in ten the largest, as now and
    then a near tie in a router sends a token to another expert.
    """
    norms = [(mine - other).norm(dim=-1) / other.norm(dim=-1) for mine, other in zip(ours, theirs, strict=True)]
    return float(torch.cat(norms).quantile(0.9))


def main() -> None:
    command_main("export", run)


if __name__ == "__main__":
    main()
