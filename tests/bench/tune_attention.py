"""Which cut of the work makes attention fastest on this card, at gpt-oss-20b's shape; checks the results first.

    python3 tests/bench/tune_attention.py --out attention.json

Decode: for each (rows, context), and for window layers, the plan there is, programs a row (splits), and a few plans
beside it, in TB/s of keys and values, by replaying a CUDA graph over enough caches that none is still in the L2. What
may differ between batches, splits and tiles in flight, must not change a bit. Prefill (--prefill): packed prompts, and
a chunk of a long one. Kernels are compiled by several processes at once first.
"""

import argparse
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
from stages.kernels.decode_attention import LoraB, decode_attention, make_workspace, splits_for
from stages.kernels.decode_attention_triton import Plan, launch, plan_for
from stages.kernels.prefill_attention import PackedDocs, prefill_attention
from tests.bench.tuning import write_figures

HEADS, KV_HEADS, CHANNELS, PAGE, WINDOW, RANK = 64, 8, 64, 128, 128, 16
COLD_BYTES = 300_000_000  # caches that a graph goes through, several times the L2
CASES = ((1, 1024), (16, 1024), (64, 4096), (256, 1024))

FULL = [Plan(), Plan(flight=3), Plan(flight=1), Plan(registers=112), Plan(registers=96), Plan(block=128)]
RING = [plan_for(ring=True), Plan(64, flight=1), Plan(64, flight=2)]


def same_bits(plan: Plan, base: Plan) -> bool:
    """Whether the two differ only in what does not set the order of sums."""
    return (plan.block, plan.warps) == (base.block, base.warps)


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
        for plan in RING if ring else (FULL[0], FULL[-1]):
            qkv, arguments = inputs(len(lengths), max(lengths), ring=ring, caches=1)[0]
            arguments["positions"][: len(lengths)] = torch.tensor(lengths, device="cuda") - 1
            expected = oracle(qkv, arguments, torch.float64)
            plain = oracle(qkv, arguments, torch.bfloat16)
            out = torch.empty_like(plain)
            workspace = make_workspace(len(lengths), HEADS, CHANNELS, max(lengths), "cuda")
            launch(out, qkv, **arguments, splits=splits, workspace=workspace, plan=plan)
            error, bar = float((out - expected).abs().max()), float((plain - expected).abs().max())
            results.append({"ring": ring, "splits": splits, "plan": plan, "error": error, "plain_error": bar})
            print(f"check ring={ring} splits={splits} {plan}: error {error:.2e}, plain bf16 {bar:.2e}", flush=True)
            assert error <= 2 * bar, "the kernel is wrong"
            assert int(workspace.tickets.abs().sum()) == 0
    return results


def company() -> dict[str, Any]:
    """Checks that 256 rows have the same bits in smaller batches and in splits; exits when they have not."""
    for ring in (False, True):
        qkv, arguments = inputs(256, 1500, ring=ring, caches=1)[0]
        arguments["positions"][:256] = torch.arange(256, device="cuda") * 131 % 1500
        whole = decode_attention(qkv, **arguments)
        for num_rows in (1, 7, 16, 64, 256):
            for splits in (1,) if ring else (1, 2, 3, 8, 16):
                few = {**arguments, "rows": arguments["rows"][:num_rows]}
                workspace = make_workspace(num_rows, HEADS, CHANNELS, 1536, "cuda")
                for launch_pdl in (False, True):
                    out = decode_attention(
                        qkv[:num_rows], **few, splits=splits, workspace=workspace, launch_pdl=launch_pdl
                    )
                    assert torch.equal(out, whole[:num_rows]), f"ring={ring}, {num_rows} rows, {splits} splits"
    print("company: a row has the same bits among 1, 7, 16, 64 and 256 rows and in 1 to 16 splits", flush=True)
    return {"equal": True}


def measure(rows: int, context: int, *, plan: Plan, splits: int, layers: list[Any], **more: Any) -> float:
    """Microseconds of one launch."""
    workspace = make_workspace(rows, HEADS, CHANNELS, context, "cuda") if splits > 1 else None
    out = torch.empty(rows, HEADS * CHANNELS, dtype=torch.bfloat16, device="cuda")

    def body() -> None:
        for qkv, arguments in layers:
            launch(out, qkv, **arguments, splits=splits, workspace=workspace, plan=plan, **more)

    return graph_ms(body) * 1000 / len(layers)


def sweep(rows: int, context: int, *, ring: bool, deadline: float) -> list[dict[str, Any]]:
    """Every variant of one case, the one in use first."""
    visible = min(context, WINDOW) if ring else context
    num_bytes = rows * visible * 2 * KV_HEADS * CHANNELS * 2
    layers = inputs(rows, context, ring=ring, caches=max(2, min(48, COLD_BYTES // num_bytes)))
    default = 1 if ring else splits_for(rows, context)
    plans = RING if ring else FULL
    others = () if ring else {1: (1, 2, 4), 16: (2, 4)}.get(rows, (2,))
    variants = [(plans[0], default), *((plans[0], n) for n in others if n != default)]
    variants += [(plan, default) for plan in plans[1:]]
    pdl = {"launch_pdl": True} if rows <= 16 else {}
    out = torch.empty(rows, HEADS * CHANNELS, dtype=torch.bfloat16, device="cuda")
    results: list[dict[str, Any]] = []
    base = None
    for plan, splits in variants:
        if time.monotonic() > deadline:
            print("out of time: the rest of the variants is left out", flush=True)
            break
        workspace = make_workspace(rows, HEADS, CHANNELS, context, "cuda") if splits > 1 else None
        line = {"rows": rows, "context": context, "ring": ring, "splits": splits, **plan._asdict()}
        try:
            launch(out, layers[0][0], **layers[0][1], splits=splits, workspace=workspace, plan=plan)
            torch.cuda.synchronize()
            us = measure(rows, context, plan=plan, splits=splits, layers=layers)
            pdl_us = measure(rows, context, plan=plan, splits=splits, layers=layers, **pdl) if pdl else None
        except Exception as error:  # a variant that does not fit the card is no reason to stop
            print(f"failed {line}: {str(error).splitlines()[0]}", flush=True)
            continue
        base = out.clone() if base is None else base
        equal = torch.equal(out, base)
        difference = float((out.float() - base.float()).abs().max() / base.float().abs().max())
        results.append({**line, "us": us, "pdl_us": pdl_us, "tb_s": num_bytes / us / 1e6, "equal": equal})
        bits = "same bits" if equal else f"differs {difference:.1e}"
        print(
            f"{'ring' if ring else 'full':4} {rows:3} x {context:4}  block {plan.block:3} flight {plan.flight}"
            f" registers {plan.registers or '-':>3} splits {splits:2}: {us:7.2f} us {num_bytes / us / 1e6:.3f} TB/s,"
            f" PDL {'-' if pdl_us is None else f'{pdl_us:.2f} us'}, {bits}",
            flush=True,
        )
        assert equal or not same_bits(plan, plans[0]), f"{line} has other bits"
        assert difference < 0.02, f"{line} differs by {difference}"
    return results


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


def compile_one(variant: tuple[Plan, bool, bool]) -> None:
    """Compiles a variant into Triton's cache on disk by launching it once."""
    plan, ring, pdl = variant
    qkv, arguments = inputs(2, 256, ring=ring, caches=1)[0]
    out = torch.empty(2, HEADS * CHANNELS, dtype=torch.bfloat16, device="cuda")
    try:
        launch(out, qkv, **arguments, splits=1, workspace=None, plan=plan, launch_pdl=pdl)
        torch.cuda.synchronize()
    except Exception as error:
        print(f"does not compile: {variant}: {str(error).splitlines()[0]}", flush=True)


def compile_all(workers: int) -> None:
    kinds = [(plan, False) for plan in FULL] + [(plan, True) for plan in RING]
    variants = [(plan, ring, pdl) for plan, ring in kinds for pdl in (False, True)]
    begin = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, variants))
    print(f"compiled {len(variants)} variants in {time.monotonic() - begin:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every figure there as JSON")
    parser.add_argument("--seconds", type=float, default=55, help="start no decode variant after so long (55)")
    parser.add_argument("--prefill", action="store_true", help="time prompts too: another minute")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile (8)")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    compile_all(args.workers)
    record: dict[str, Any] = {}
    parts: list[tuple[str, Callable[[], Any]]] = [("check", check), ("company", company)]
    for rows, context in CASES:
        parts.append((f"full {rows}x{context}", partial(sweep, rows, context, ring=False, deadline=deadline)))
    for rows in (1, 16, 64, 256):
        parts.append((f"ring {rows}", partial(sweep, rows, 1024, ring=True, deadline=deadline)))
    cases = (PackedDocs((512,) * 64), PackedDocs((4096,), past=32768), PackedDocs((1000,)), PackedDocs((4096,)))
    for count, (docs, window) in enumerate((docs, window) for docs in cases for window in (None, WINDOW)):
        if not args.prefill:
            break
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
            write_figures(args.out, "tune_attention", record)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
