"""How fast the update trains, in how much memory, and how near the arithmetic limit: `flexsink bench update`.

Random weights of a published shape are made on the card. For each length one sequence of so many tokens, and as many
packed completions behind shared prompts, go through the project's own trainer: forward, backward and one optimizer step
of the GRPO loss on random advantages, the median of the repeats after a warm-up. Our rows run under a memory cap where
one is given. Beside them stand the floor (update_floor.py) and the peers (update_peers.py), which may use the whole
card. Whole iterations with the engine are in update_iteration.py, its agreement with the trainer in agreement.py. The
shape tiny runs on a CPU, in seconds.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stages.bench import agreement, peers, update_iteration, update_peers
from stages.bench.findings import Report
from stages.bench.kernel_times import kernel_times
from stages.bench.memory import OVERSHOOT_BYTES, Memory, cap_memory, free_memory, synchronize
from stages.bench.update_cases import IterationCase, Layout, packed, sequence
from stages.bench.update_floor import REFERENCE_TFLOPS, floor_tokens_per_s, step_flops
from stages.bench.update_longest import fits_memory, longest
from stages.bench.update_step import Setting, Stopwatch, Training, open_policy, random_samples
from stages.config import UserError
from stages.model.shapes import Shape
from stages.trainer import Pack, deal_packs

Row = dict[str, Any]
KINDS = ("rows", "longest", "iteration", "agreement", "startup")
SECONDS_PER_ROW = 60.0  # after which no other repeat begins
PEERS_SECONDS = 240.0
LONGEST_SECONDS = 240.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    setting: Setting
    targets: tuple[str, ...] = ("attention+experts",)
    # of LoRA, one after the other
    tokens: tuple[int, ...] = ()
    cap_bytes: float = 0.0
    # that our rows may reserve on the card; 0 is all of it
    repeats: int = 5
    # after a warm-up; 0 measures the first and only step
    peers: tuple[str, ...] = ()
    longest: bool = False
    iterations: tuple[IterationCase, ...] = ()
    agreement: bool = False
    updates: int = 20
    # of the agreement
    slots: int = 256
    # of the iterations' engine
    pack_tokens: int = 0
    # of a micro-batch; 0 is all of a row's tokens, and 8192 in an iteration
    profile: bool = False
    # also tell each case's kernels


def measure(
    options: Options,
    *,
    head: Row,
    save: Callable[[Row], None] = lambda body: None,
    note: Callable[[str], None] = lambda text: None,
) -> Report:
    """Everything asked for, on the first CUDA card, or of the shape tiny on a CPU; UserError when there is no card."""
    shape = options.setting.shape
    if not torch.cuda.is_available() and not shape.name.startswith("tiny"):
        raise UserError(f"bench update of {shape.name} needs a CUDA card", "without one: --shape tiny --tokens 256,512")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    memory = Memory(device)
    report = Report(head | {"reference_tflops": REFERENCE_TFLOPS}, save, kinds=KINDS)
    for targets in options.targets:
        setting = Setting(**{**vars(options.setting), "targets": targets})
        measure_setting(options, setting, report, memory=memory, note=note)
        cap_memory(device, 0)
        free_memory()
    if options.agreement:
        note("agreement: transformers against itself")
        about = {"system": "transformers", "mode": "eager, one row against a padded batch"}
        report.attempt("agreement", about, lambda: agreement.yardstick(options.setting, device=device))
    for name in options.peers:
        note(f"peer {name}")
        rows = peers.peer(name, transformers=update_peers.transformers_rows)(
            shape, options.tokens, device=device, seconds=PEERS_SECONDS, rank=options.setting.rank,
            targets=options.targets,
        )  # fmt: skip
        report.add_peer(name, rows, lambda row: floor_tokens_per_s(shape, sequence(row["tokens"])))
        free_memory()
    return report


def measure_setting(
    options: Options,
    setting: Setting,
    report: Report,
    *,
    memory: Memory,
    note: Callable[[str], None],
) -> None:
    """Adds our rows of one policy."""
    device = memory.device
    about, name = setting.about(), f"{setting.shape.name}, LoRA on {setting.targets}"
    note(f"{name}: weights")
    memory.reset()
    started = time.perf_counter()
    policy = open_policy(setting, device=device)
    synchronize(device)
    adapter = sum(parameter.nbytes for _, parameter in policy.parameters())
    made = {"weights_s": time.perf_counter() - started, "weight_bytes": policy.weight_bytes(), "adapter_bytes": adapter}
    report.add("startup", about | made | memory.row())
    free_memory()
    about["cap_bytes"] = cap = cap_memory(device, options.cap_bytes)
    training = Training(policy, setting, memory_bytes=cap - OVERSHOOT_BYTES if cap else 0)
    for layout in [layout for tokens in options.tokens for layout in (sequence(tokens), packed(tokens))]:
        note(f"{name}: {layout.mode} of {layout.tokens} tokens")
        report.attempt(
            "rows",
            about | {"mode": layout.mode, "tokens": layout.tokens},
            functools.partial(measure_layout, training, setting, layout, options, memory=memory),
        )
    if options.longest:
        note(f"{name}: the longest sequence")
        report.attempt("longest", dict(about), functools.partial(measure_longest, training, setting, options, memory))
    for case in options.iterations:
        note(f"{name}: iteration of {case}")
        run = functools.partial(update_iteration.measure, training, case, memory=memory)
        kinds = {"cap_bytes": about["cap_bytes"], "slots": options.slots, "seed": setting.seed}
        if options.pack_tokens:
            kinds["pack_tokens"] = options.pack_tokens
        report.attempt("iteration", about | case._asdict(), functools.partial(run, **kinds))
    if options.agreement:
        note(f"{name}: agreement over {options.updates} updates")
        sampled = agreement.case_of(setting.shape)
        report.attempt(
            "agreement",
            about | {"mode": "engine against trainer"} | sampled._asdict(),
            lambda: agreement.measure(training, sampled, updates=options.updates, seed=setting.seed),
        )
    training.close()


def measure_layout(training: Training, setting: Setting, layout: Layout, options: Options, *, memory: Memory) -> Row:
    """The row of one layout; tokens count as often as they are computed."""
    policy = training.policy
    memory.reset()
    samples = random_samples(layout, vocabulary=setting.shape.vocabulary, seed=setting.seed)
    packs = deal_packs(samples, options.pack_tokens or layout.tokens)
    watch = Stopwatch(policy.device)
    parts: list[dict[str, float]] = []
    with memory.watched():
        started = time.perf_counter()
        training.step(packs, watch, on_policy=True)  # compiles, and makes the optimizer's state
        warm_up = watch.milliseconds()
        first = time.perf_counter() - started
        started = time.perf_counter()
        while len(parts) < options.repeats and (not parts or time.perf_counter() - started < SECONDS_PER_ROW):
            training.step(packs, watch, on_policy=True)
            parts.append(watch.milliseconds())
        held = memory.details()
    kernels = profiled(training, packs[0]) if options.profile and policy.device.type == "cuda" else {}
    plan = training.plan(max(pack.num_tokens for pack in packs))
    return row_of(setting.shape, layout, parts or [warm_up]) | {
        "completion_tokens": layout.trained_tokens,
        "packs": len(packs),
        "experts_at_once": plan.experts.experts,
        "kept_attention": plan.kept_attention,
        "kept_experts": plan.kept_experts,
        "first_s": first,
        **held,
        **kernels,
    }


def row_of(shape: Shape, layout: Layout, parts: list[dict[str, float]]) -> Row:
    """The figures that follow from the milliseconds of each repeat's parts."""
    totals = [sum(part.values()) for part in parts]
    milliseconds = statistics.median(totals)
    medians = {name: statistics.median(part[name] for part in parts) for name in ("forward", "backward", "optimizer")}
    rate, floor = 1e3 * layout.tokens / milliseconds, floor_tokens_per_s(shape, layout)
    return {
        "tokens_per_s": rate,
        "unshared_tokens_per_s": 1e3 * layout.unshared_tokens / milliseconds,
        "forward_backward_tokens_per_s": 1e3 * layout.tokens / (medians["forward"] + medians["backward"]),
        "ms": milliseconds,
        **{f"{name}_ms": value for name, value in medians.items()},
        "ms_of_repeats": totals,
        "floor_tokens_per_s": floor,
        "floor_share": rate / floor,
        "gflop_per_token": step_flops(shape, layout).total / layout.tokens / 1e9,
    }


def profiled(training: Training, pack: Pack) -> Row:
    """The kernels of a forward and of a backward pass over one pack."""
    passed: list[Any] = []

    def forward(_: int) -> None:
        passed.append(training.logprobs(pack, grad=True))

    def backward(_: int) -> None:
        passed.pop().sum().backward()

    found = {"forward_kernels": kernel_times(forward, steps=1), "backward_kernels": kernel_times(backward, steps=1)}
    training.optimizer.zero_grad(set_to_none=True)
    return found


def measure_longest(training: Training, setting: Setting, options: Options, memory: Memory) -> Row:
    """The longest sequence that goes through a step, and what it took; about `tokens` of the last that did not fit."""
    peaks: dict[int, Row] = {}

    def attempt(tokens: int) -> None:
        layout = sequence(tokens)
        memory.reset()
        samples = random_samples(layout, vocabulary=setting.shape.vocabulary, seed=0)
        watch = Stopwatch(training.policy.device)
        with memory.watched():
            training.step(deal_packs(samples, tokens), watch, on_policy=True)
            peaks[tokens] = row_of(setting.shape, layout, [watch.milliseconds()]) | memory.details()

    start = max(options.tokens, default=4096) if torch.cuda.is_available() else 32
    limit = 1 << 20 if torch.cuda.is_available() else 128
    found = longest(
        lambda tokens: fits_memory(lambda: attempt(tokens)), start=start, limit=limit, seconds=LONGEST_SECONDS
    )
    if not found.tokens:
        raise UserError(f"not even {start} tokens fit: {found.reason}", "begin with fewer --tokens")
    return {"tokens": found.tokens, "tried": found.tried, "reason": found.reason, **peaks[found.tokens]}
