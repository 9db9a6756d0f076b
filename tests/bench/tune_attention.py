"""Which cut of the work makes attention fastest on this card, at gpt-oss-20b's shape; checks the results first.

    python3 tests/bench/tune_attention.py --out attention.json

Decode: every variant of (block, warps, tiles in flight, early, splits) for each (rows, context) and for window layers,
in TB/s of keys and values, by replaying a CUDA graph over enough caches that none is still in the L2. Prefill:
prompts packed without padding, and a chunk of a long prompt. Kernels are compiled by several processes at once first.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from stages.kernels import reference
from stages.kernels.decode_attention import LoraB, make_workspace, splits_for
from stages.kernels.decode_attention_triton import Plan, launch, plan_for
from stages.kernels.prefill_attention import PackedDocs, prefill_attention

HEADS, KV_HEADS, CHANNELS, PAGE, WINDOW, RANK = 64, 8, 64, 128, 128, 16
COLD_BYTES = 300_000_000  # caches that a graph goes through, several times the L2
CASES = ((1, 1024), (16, 1024), (64, 4096), (256, 1024))

FULL = [Plan(b, w, f, e) for b, w, f, e in (
    (64, 4, 2, False), (64, 4, 3, False), (64, 4, 4, False), (64, 4, 3, True), (64, 2, 3, False), (64, 8, 3, False),
    (128, 4, 2, False), (128, 4, 3, False), (128, 8, 2, False), (32, 2, 4, False), (32, 4, 4, False), (32, 1, 4, False),
)]  # fmt: skip
SPLIT = [Plan(b, w, f, e, c) for b, w, f, e, c in (
    (64, 4, 2, True, 8), (64, 4, 2, False, 8), (64, 4, 3, False, 8), (64, 8, 2, True, 8), (64, 4, 2, True, 4),
    (32, 4, 2, True, 8), (32, 2, 3, True, 8), (128, 8, 2, True, 8), (128, 4, 2, False, 8), (64, 8, 2, True, 16),
)]  # fmt: skip
RING = [Plan(b, w, f, e) for b, w, f, e in (
    (128, 8, 1, True), (128, 4, 1, True), (128, 4, 1, False), (128, 8, 1, False), (64, 4, 2, True), (64, 4, 2, False),
    (64, 2, 2, False), (64, 4, 1, True), (32, 2, 4, False),
)] + [Plan(128, 4, 1, True, registers=128), Plan(64, 4, 2, True, registers=128)]  # fmt: skip


def inputs(
    rows: int, context: int, *, ring: bool, caches: int, rank: int = RANK
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Arguments of one step for each of `caches` layers, every row `context` tokens long, the new one among them."""
    torch.manual_seed(rows + context)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.bfloat16, device="cuda")

    pages = -(-context // PAGE)
    table = torch.zeros(rows + 1, pages, dtype=torch.int32, device="cuda")
    table[:rows] = torch.randperm(rows * pages, device="cuda").view(rows, pages) + 1
    places = rows + 1 if ring else rows * pages + 1
    width = (HEADS + 2 * KV_HEADS) * CHANNELS
    angles = torch.rand(context, CHANNELS // 2, device="cuda") * 6
    positions = torch.full((rows + 1,), context - 1, dtype=torch.int32, device="cuda")
    lora = LoraB(*(0.05 * draw(n * CHANNELS, rank) for n in (HEADS, KV_HEADS, KV_HEADS)), 2.0) if rank else None
    shared = {
        "sinks": draw(HEADS), "cos": angles.cos(), "sin": angles.sin(), "bias": draw(width), "lora": lora,
        "rows": torch.arange(rows, dtype=torch.int32, device="cuda"), "positions": positions,
        "page_table": None if ring else table, "scale": CHANNELS**-0.5,
    }  # fmt: skip
    qkv = draw(rows, width + 3 * rank)
    cache = (places, KV_HEADS, PAGE, CHANNELS)
    return [(qkv, {**shared, "keys": draw(*cache), "values": draw(*cache)}) for _ in range(caches)]


def graph_ms(body: Callable[[], None], repeats: int = 30) -> float:
    """Median time of a replay of `body` as a CUDA graph, in milliseconds."""
    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def oracle(qkv: Tensor, arguments: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The plain path's result in `dtype`, on copies."""

    def convert(value: Any) -> Any:
        if isinstance(value, LoraB):
            return LoraB(*(convert(x) for x in value[:3]), value.scale)
        if not isinstance(value, Tensor):
            return value
        return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()

    return reference.decode_attention(convert(qkv), **{name: convert(value) for name, value in arguments.items()})


def check() -> list[dict[str, Any]]:
    """Errors against float64 at true shapes, beside the plain bf16 path's; exits when one is more than twice that."""
    results = []
    for ring, splits, lengths in (
        (False, 1, [1, 127, 128, 129, 1000, 4097]),
        (False, 8, [1, 127, 128, 129, 1000, 4097]),
        (True, 1, [1, 127, 128, 129, 130, 4097]),
    ):
        for plan in (None, *([RING[0], RING[4]] if ring else [FULL[0], SPLIT[0], FULL[10]])):
            qkv, arguments = inputs(len(lengths), max(lengths), ring=ring, caches=1)[0]
            arguments["positions"][: len(lengths)] = torch.tensor(lengths, device="cuda") - 1
            expected = oracle(qkv, arguments, torch.float64)
            plain = oracle(qkv, arguments, torch.bfloat16)
            out = torch.empty_like(plain)
            workspace = make_workspace(16, HEADS, CHANNELS, 32, "cuda")
            launch(out, qkv, **arguments, splits=splits, workspace=workspace, plan=plan)
            error, bar = float((out - expected).abs().max()), float((plain - expected).abs().max())
            results.append({"ring": ring, "splits": splits, "plan": plan, "error": error, "plain_error": bar})
            print(f"check ring={ring} splits={splits} {plan}: error {error:.2e}, plain bf16 {bar:.2e}", flush=True)
            assert error <= 2 * bar, "the kernel is wrong"
            assert int(workspace.tickets.abs().sum()) == 0
    return results


def measure(rows: int, context: int, *, ring: bool, plan: Plan, splits: int, layers: list[Any], **more: Any) -> float:
    """Microseconds of one launch."""
    workspace = make_workspace(256, HEADS, CHANNELS, 64, "cuda")
    out = torch.empty(rows, HEADS * CHANNELS, dtype=torch.bfloat16, device="cuda")

    def body() -> None:
        for qkv, arguments in layers:
            launch(out, qkv, **arguments, splits=splits, workspace=workspace, plan=plan, **more)

    return graph_ms(body) * 1000 / len(layers)


def sweep(rows: int, context: int, *, ring: bool, deadline: float) -> list[dict[str, Any]]:
    """Every variant of one case, best first."""
    visible = min(context, WINDOW) if ring else context
    num_bytes = rows * visible * 2 * KV_HEADS * CHANNELS * 2
    layers = inputs(rows, context, ring=ring, caches=max(2, min(48, COLD_BYTES // num_bytes)))
    default = splits_for(rows, context)
    if ring:
        variants = [(plan, 1) for plan in RING]
    elif rows <= 16:
        wanted = sorted({s for s in (default, default // 2, default * 2, 16, 4, 8) if 2 <= s <= 64 and s * rows <= 128})
        variants = [(plan, s) for s in wanted for plan in SPLIT] + [(plan, 1) for plan in FULL[:2]]
    else:
        variants = [(plan, 1) for plan in FULL] + [(SPLIT[1], 2)]
    chosen = (plan_for(rows, ring=ring), 1 if ring else default)
    variants = [chosen, *(v for v in variants if v != chosen)]
    out = torch.empty(rows, HEADS * CHANNELS, dtype=torch.bfloat16, device="cuda")
    workspace = make_workspace(256, HEADS, CHANNELS, 64, "cuda")
    results, base = [], None
    for plan, splits in variants:
        if time.monotonic() > deadline:
            print("out of time: the rest of the variants is left out", flush=True)
            break
        line = {"rows": rows, "context": context, "ring": ring, "splits": splits, **plan._asdict()}
        try:
            launch(out, layers[0][0], **layers[0][1], splits=splits, workspace=workspace, plan=plan)
            base = out.clone() if base is None else base
            difference = float((out.float() - base.float()).abs().max() / base.float().abs().max())
            us = measure(rows, context, ring=ring, plan=plan, splits=splits, layers=layers)
        except Exception as error:  # a variant that does not fit the card is no reason to stop
            print(f"failed {line}: {str(error).splitlines()[0]}", flush=True)
            workspace.tickets.zero_()
            continue
        results.append({**line, "us": us, "tb_s": num_bytes / us / 1e6, "difference": difference})
        assert difference < 0.02, f"{line} differs by {difference}"
    best = sorted(results, key=lambda result: result["us"])
    for mark, result in (("default", results[0]), *((f"best {i}", r) for i, r in enumerate(best[:5]))):
        words = {k: v for k, v in result.items() if k in ("splits", *Plan._fields) and v is not None}
        print(
            f"{'ring' if ring else 'full'} {rows} x {context}: {mark:8} {result['us']:8.2f} us"
            f" {result['tb_s']:.3f} TB/s {words}",
            flush=True,
        )
    plan, splits = Plan(**{k: best[0][k] for k in Plan._fields}), best[0]["splits"]
    extras: tuple[tuple[str, dict[str, Any]], ...] = (("without LoRA", {}), ("launch_pdl", {"launch_pdl": True}))
    for name, more in extras if rows in (1, 64) else ():  # each is a compilation
        chosen_layers = inputs(rows, context, ring=ring, caches=len(layers), rank=0) if not more else layers
        us = measure(rows, context, ring=ring, plan=plan, splits=splits, layers=chosen_layers, **more)
        print(f"   best {name}: {us:.2f} us", flush=True)
        best.append({**best[0], "variant": name, "us": us, "tb_s": num_bytes / us / 1e6})
    return best


def prefill(docs: PackedDocs, window: int | None, *, first: bool) -> dict[str, Any]:
    """Time of one layer's prefill attention, checked against float64 on 64 of its queries."""
    torch.manual_seed(0)
    query = torch.randn(docs.num_queries, HEADS, CHANNELS, dtype=torch.bfloat16, device="cuda")
    key, value = (torch.randn(docs.num_keys, KV_HEADS, CHANNELS, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    sinks = torch.randn(HEADS, dtype=torch.bfloat16, device="cuda")

    def body() -> Tensor:
        return prefill_attention(query, key, value, sinks=sinks, scale=0.125, window=window, docs=docs)

    begin = time.monotonic()
    with torch._dynamo.config.patch(error_on_recompile=not first, fail_on_recompile_limit_hit=True):
        out = body()
        torch.cuda.synchronize()
        first_s = time.monotonic() - begin
        times = []
        for _ in range(12):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            body()
            events[1].record()
            torch.cuda.synchronize()
            times.append(events[0].elapsed_time(events[1]))

    lengths = torch.tensor(docs.lengths, device="cuda")
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    sample = torch.linspace(0, docs.num_queries - 1, 64, device="cuda").long()
    key_at, query_at = torch.arange(docs.num_keys, device="cuda"), (sample + docs.past)[:, None]
    seen = (key_at <= query_at) & (key_at >= starts[sample][:, None])
    pairs = (torch.arange(docs.num_queries, device="cuda") - starts + 1 + docs.past).double()
    if window is not None:
        seen &= key_at > query_at - window
        pairs = pairs.clamp(max=window)
    errors = []
    for dtype in (torch.float64, torch.bfloat16):
        parts = (x.to(dtype).transpose(0, 1)[None] for x in (query[sample], key, value))
        errors.append(reference.sink_attention(*parts, sinks.to(dtype), scale=0.125, visible=seen)[0].transpose(0, 1))
    error, bar = (float((x - errors[0]).abs().max()) for x in (out[sample], errors[1]))
    ms = statistics.median(times)
    tflops = 4 * HEADS * CHANNELS * float(pairs.sum()) / ms / 1e9
    print(
        f"prefill {len(docs.lengths)} x {docs.lengths[0]} past {docs.past} window {window}: {ms:.3f} ms,"
        f" {tflops:.0f} TFLOP/s, first call {first_s:.1f} s, error {error:.2e}, plain bf16 {bar:.2e}",
        flush=True,
    )
    assert error <= 2 * bar, "the kernel is wrong"
    return {"docs": docs, "window": window, "ms": ms, "tflops": tflops, "first_s": first_s, "error": error, "bar": bar}


def compile_one(variant: tuple[Plan, bool, bool, int]) -> None:
    """Compiles a variant into Triton's cache on disk by launching it once."""
    plan, ring, split, rank = variant
    qkv, arguments = inputs(2, 256, ring=ring, caches=1, rank=rank)[0]
    out = torch.empty(2, HEADS * CHANNELS, dtype=torch.bfloat16, device="cuda")
    workspace = make_workspace(2, HEADS, CHANNELS, 4, "cuda")
    try:
        launch(out, qkv, **arguments, splits=2 if split else 1, workspace=workspace, plan=plan)
        torch.cuda.synchronize()
    except Exception as error:
        print(f"does not compile: {variant}: {str(error).splitlines()[0]}", flush=True)


def compile_all(workers: int) -> None:
    variants = [(plan, False, False, RANK) for plan in FULL] + [(plan, False, True, RANK) for plan in SPLIT]
    variants += [(plan, True, False, RANK) for plan in RING]
    begin = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, variants))
    print(f"compiled {len(variants)} variants in {time.monotonic() - begin:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every figure there as JSON")
    parser.add_argument("--seconds", type=float, default=110, help="start no decode variant after so long (110)")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile (8)")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    compile_all(args.workers)
    record: dict[str, Any] = {
        "bench": "tune_attention", "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "command": " ".join(["tests/bench/tune_attention.py", *sys.argv[1:]]),
    }  # fmt: skip
    parts: list[tuple[str, Callable[[], Any]]] = [("check", check)]
    for rows, context in CASES:
        parts.append((f"full {rows}x{context}", partial(sweep, rows, context, ring=False, deadline=deadline)))
    for rows in (1, 16, 64, 256):
        parts.append((f"ring {rows}", partial(sweep, rows, 1024, ring=True, deadline=deadline)))
    cases = (PackedDocs((512,) * 64), PackedDocs((4096,), past=32768), PackedDocs((1000,)), PackedDocs((4096,)))
    for count, (docs, window) in enumerate((docs, window) for docs in cases for window in (None, WINDOW)):
        parts.append((f"prefill {docs.lengths[0]} {window} {count}", partial(prefill, docs, window, first=count == 0)))
    failures = 0
    for name, part in parts:
        begin = time.monotonic()
        try:
            record[name] = part()
        except Exception as error:
            failures += 1
            print(f"{name} FAILED", flush=True)
            traceback.print_exc()
            record[name] = {"failed": str(error)}
        print(f"-- {name}: {time.monotonic() - begin:.1f} s", flush=True)
        torch.cuda.empty_cache()
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
