"""How fast the engine decodes, and how near the memory limit: `flexsink bench engine`.

Random weights of a published shape are made on the card. Each case has its rows' context in the cache already (random
keys and values, nothing is prefilled) and decodes by graph replay with sampling on, at temperature 1: the median of the
repeats. Beside it stand the floor (stages/bench/floor.py), once at 4.3 TB/s with uniform routing, once at the bandwidth
this card was measured to read at and the experts that were really hit, and the peers (stages/bench/peers.py). Whole
rollouts and prefills are in stages/bench/rollouts.py.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.bench import peers, rollouts
from stages.bench.cases import Case
from stages.bench.decode import DecodeCase, open_case
from stages.bench.findings import Report
from stages.bench.floor import REFERENCE_TB_S, expected_experts, floor_tokens_per_s
from stages.bench.kernel_times import kernel_times
from stages.bench.memory import Memory, free_memory, synchronize
from stages.config import UserError
from stages.model.policy import Policy
from stages.model.shapes import Shape
from stages.model.synthetic import synthetic_policy

Row = dict[str, Any]
OpenCase = Callable[..., DecodeCase]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP_STEPS = 8
PEERS_SECONDS = 100.0
KINDS = ("rows", "replay", "prefill", "startup")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    shape: Shape
    cases: tuple[Case, ...]
    ranks: tuple[int, ...] = (0,)
    # of LoRA; 0 is none
    repeats: int = 5
    steps: int = 32
    # decode steps of a repeat
    peers: tuple[str, ...] = ()
    replay: bool = False
    slots: int = 256
    # of the replay's engine
    profile: bool = False
    # also tell each case's kernels
    prefill: bool = False
    dtype: str = "bf16"
    seed: int = 0


def measure(
    options: Options,
    *,
    head: Row,
    save: Callable[[Row], None] = lambda body: None,
    note: Callable[[str], None] = lambda text: None,
) -> Report:
    """Everything asked for, on the first CUDA card; UserError without one."""
    if not torch.cuda.is_available():
        raise UserError("bench engine needs a CUDA card", "torch.cuda.is_available() is False here")
    from stages.bench.bandwidth import read_tb_s

    device = torch.device("cuda", torch.cuda.current_device())
    memory = Memory(device)
    report = Report(head | {"read_tb_s": read_tb_s(device), "reference_tb_s": REFERENCE_TB_S}, save, kinds=KINDS)
    free_memory()
    for rank in options.ranks:
        note(f"{options.shape.name}, LoRA {rank or 'none'}: weights")
        measure_policy(options, rank, report, memory=memory, note=note)
        free_memory()
    for name in options.peers:
        note(f"peer {name}")
        rows = peers.peer(name)(options.shape, options.cases, device=device, seconds=PEERS_SECONDS)
        measure_peer(name, rows, options.shape, report)
        free_memory()
    return report


def measure_policy(options: Options, rank: int, report: Report, *, memory: Memory, note: Callable[[str], None]) -> None:
    """Adds our rows with LoRA of this rank."""
    memory.reset()
    started = time.perf_counter()
    policy = synthetic_policy(
        options.shape, lora_rank=rank, dtype=DTYPES[options.dtype], device=memory.device, seed=options.seed
    )
    synchronize(memory.device)
    made = {"lora": rank, "weights_s": time.perf_counter() - started, "weight_bytes": policy.weight_bytes()}
    report.add("startup", made | memory.row())
    read_tb_s = report.body["read_tb_s"]
    for case in options.cases:
        note(f"{options.shape.name}, LoRA {rank or 'none'}: {case}")
        about = {"system": "flexsink", "batch": case.rows, "context": case.context, "lora": rank}
        report.attempt("rows", about, functools.partial(measure_case, policy, options, case, memory, read_tb_s))
    if options.prefill:
        note("prefill")
        report.attempt(
            "prefill", {"lora": rank}, lambda: rollouts.prefill(policy, memory=memory, repeats=options.repeats)
        )
    if options.replay:
        note("replay")
        rollout = rollouts.Rollout(max_slots=options.slots)
        report.attempt(
            "replay", {"lora": rank}, lambda: rollouts.replay(policy, memory=memory, rollout=rollout, seed=options.seed)
        )


def measure_case(
    policy: Policy,
    options: Options,
    case: Case,
    memory: Memory,
    read_tb_s: float,
    *,
    open_case: OpenCase = open_case,
) -> Row:
    """The row of one case."""
    device = policy.device
    memory.reset()
    started = time.perf_counter()
    decoding = open_case(
        policy, rows=case.rows, context=case.context, room=max(options.steps, WARM_UP_STEPS), seed=options.seed
    )
    try:
        synchronize(device)
        startup = time.perf_counter() - started
        milliseconds = time_steps(decoding, options.steps, options.repeats, device=device)
        held = memory.row()
        kernels = {}
        if options.profile:
            decoding.rewind()
            kernels = {"kernels": kernel_times(decoding.run, steps=min(8, options.steps))}
        decoding.rewind()  # one more step has no room
        routes = decoding.routes()
    finally:
        decoding.close()
    hit = distinct_experts(routes)
    figures = row_of(options.shape, case, statistics.median(milliseconds), sum(hit) / len(hit), read_tb_s)
    return figures | {
        "ms_per_step_of_repeats": milliseconds,
        "steps": options.steps,
        "distinct_experts_of_layers": hit,
        "startup_s": startup,
        "capture_s": decoding.capture_s,
        "cache_bytes": decoding.cache_bytes,
        **held,
        **kernels,
    }


def row_of(shape: Shape, case: Case, milliseconds: float, experts_hit: float, read_tb_s: float) -> Row:
    """The figures that follow from the time of a step and the experts it hit in a layer, on average."""
    rate = 1e3 * case.rows / milliseconds
    floor = floor_tokens_per_s(shape, case.rows, case.context)
    read_floor = floor_tokens_per_s(shape, case.rows, case.context, read_tb_s=read_tb_s, experts_hit=experts_hit)
    return {
        "tokens_per_s": rate,
        "ms_per_step": milliseconds,
        "floor_tokens_per_s": floor,
        "floor_share": rate / floor,
        "read_floor_tokens_per_s": read_floor,
        "read_floor_share": rate / read_floor,
        "distinct_experts": experts_hit,
        "expected_experts": expected_experts(shape, case.rows),
    }


def time_steps(decoding: DecodeCase, steps: int, repeats: int, *, device: torch.device) -> list[float]:
    """Milliseconds a step, of each repeat; every one begins at the case's own context."""
    decoding.run(WARM_UP_STEPS)
    found = []
    for _ in range(repeats):
        decoding.rewind()
        found.append(1e3 * timed(lambda: decoding.run(steps), device) / steps)
    return found


def timed(action: Callable[[], None], device: torch.device) -> float:
    """Seconds the device spent on what `action` asked of it."""
    if device.type != "cuda":
        started = time.perf_counter()
        action()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def distinct_experts(routes: Tensor) -> list[int]:
    """How many experts each layer's tokens chose; routes int [layers, rows, k]."""
    return [len(set(layer.flatten().tolist())) for layer in routes]


def measure_peer(name: str, rows: Iterator[Row], shape: Shape, report: Report) -> None:
    """Adds a peer's rows with their share of our floor, which no 16-bit engine can reach."""
    report.add_peer(name, rows, lambda row: floor_tokens_per_s(shape, row["batch"], row["context"]))
