"""Sweeps how the MXFP4 experts' kernels are launched, on a card: python tests/bench/tune_experts.py --out FILE

Checks the kernels against dequantized weights at the true shape first, then times gate_up and down of gpt-oss-20b for
1, 16, 64 and 256 tokens over LAYERS layers of random weights, in CUDA graphs. Variants are compiled in processes of
their own beforehand.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from stages.bench.floor import REFERENCE_TB_S
from stages.kernels import reference
from stages.kernels.norms import combine_norm
from stages.kernels.packed_experts import (
    PLANS,
    Launch,
    PackedExperts,
    PackedLora,
    Plan,
    Relaid,
    dequantize,
    down,
    experts_decode,
    experts_prefill,
    gate_up,
    plan_for,
)
from stages.kernels.routing import route, router_logits
from tests.bench.tuning import write_figures

E, D, F, R = 32, 2880, 2880, 16
LAYERS = 6


def layer(seed, rank=0, num_experts=E):
    g = torch.Generator("cuda").manual_seed(seed)

    def matrix(rows, inputs, interleaved):
        words = torch.randint(
            -32768, 32767, (num_experts, rows // 16, 4 * inputs), dtype=torch.int16, device="cuda", generator=g
        )
        bytes_ = torch.randint(
            118 + 126, 122 + 126, (num_experts, rows // 16, inputs // 2), dtype=torch.uint8, device="cuda", generator=g
        )
        return Relaid(words, bytes_.view(torch.int32), interleaved)

    def draw(*shape, dtype=torch.bfloat16):
        return (torch.randn(*shape, device="cuda", generator=g) * 0.05).to(dtype)

    def lora(rows, inputs):
        return PackedLora(draw(num_experts, rank, inputs), draw(num_experts, rows, rank), 2.0) if rank else None

    return PackedExperts(
        matrix(2 * F, D, True),
        matrix(D, F, False),
        draw(num_experts, 2 * F, dtype=torch.float32),
        draw(num_experts, D, dtype=torch.float32),
        lora(2 * F, D),
        lora(D, F),
        1.702,
        7.0,
    )


SWEEP = {
    1: [(8, 0, ((4, 4, 3), (8, 4, 3), (4, 2, 3)), ((4, 4, 3), (4, 4, 2), (8, 4, 3), (2, 2, 3)))],
    16: [(8, 0, ((8, 4, 3), (4, 4, 3)), ((8, 4, 3), (4, 4, 3), (8, 4, 3)))],
    64: [(16, 8, ((4, 4, 3), (8, 4, 3)), ((4, 4, 3), (4, 4, 3), (8, 4, 3)))],
    256: [
        (32, 16, ((8, 4, 3), (8, 8, 3)), ((8, 4, 3), (8, 4, 3), (8, 8, 3))),
        (64, 32, ((8, 4, 3), (8, 8, 3)), ((8, 4, 3), (8, 8, 3))),
        (64, 16, ((8, 4, 3), (8, 8, 3), (8, 8, 2)), ((8, 4, 3), (8, 8, 3))),
        (32, 8, ((8, 4, 3),), ((8, 4, 3),)),
    ],
}  # fmt: skip


def variants(rows):
    """(tokens, few, which, Launch)"""
    for tokens, few, ups, downs in SWEEP[rows]:
        for which, shapes in (("up", ups), ("down", downs)):
            for tiles, warps, stages in dict.fromkeys(shapes):
                yield tokens, few, which, Launch(tiles, warps, stages)


def plan_of(rows, tokens, few, which, launch):
    other = Launch(4, 4, 2)
    return Plan(rows, tokens, few, launch if which == "up" else other, launch if which == "down" else other)


def inputs(rows, seed, tokens, num_experts=E):
    g = torch.Generator("cuda").manual_seed(1000 + seed)
    hidden = torch.randn(rows, D, device="cuda", generator=g).bfloat16()
    routing = route(torch.randn(rows, num_experts, device="cuda", generator=g), top_k=4, tile=tokens)
    return hidden, routing


def work(layers, rows, tokens, few, which, launch):
    plan = plan_of(rows, tokens, few, which, launch)
    steps = []
    for index, packed in enumerate(layers):
        hidden, routing = inputs(rows, index, tokens)
        if which == "up":
            steps.append(lambda h=hidden, r=routing, p=packed: gate_up(h, r, p, plan))
        else:
            act = torch.randn(rows * 4, F, device="cuda").bfloat16()
            steps.append(lambda a=act, r=routing, p=packed: down(a, r, p, plan))
    return lambda: [step() for step in steps]


_LAYER = []


def compile_one(args):
    try:
        if not _LAYER:
            _LAYER.append(layer(0))
        work(_LAYER, *args)()
        torch.cuda.synchronize()
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def graph_ms(function, repeats=15):
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = function()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    del keep
    return statistics.median(times)


def measure_pair(layers, rows):
    """Microseconds of a layer's gate_up and down, and their read_share."""
    plan = plan_for(rows)
    given = [(packed, *inputs(rows, index, plan.tokens)) for index, packed in enumerate(layers)]

    def step():
        return [
            down(gate_up(hidden, routing, packed, plan), routing, packed, plan) for packed, hidden, routing in given
        ]

    us = graph_ms(step) * 1e3 / len(layers)
    hit = statistics.mean(routing.indices.unique().numel() for _, _, routing in given)
    return us, read_share(hit, 3 * F * D, us)


def read_share(hit, numbers, us):
    """The share of REFERENCE_TB_S at which `hit` experts' matrices of so many numbers each are read in `us`."""
    return hit * numbers * 17 / 32 / (us * 1e-6) / (REFERENCE_TB_S * 1e12)


def check(layers):
    packed = layer(7, rank=R)
    for rows in (1, 16, 64, 256):
        plan = plan_for(rows)
        hidden, routing = inputs(rows, 5, plan.tokens)
        partials = experts_decode(hidden, routing, packed)
        got = (partials.sum(0).view(rows, 4, D) * routing.weights[..., None]).sum(1)
        want = torch.zeros(rows, D, dtype=torch.float64, device="cuda")
        plain = experts_prefill(hidden, routing.indices, routing.weights, packed)
        for expert in range(E):
            tokens, place = torch.where(routing.indices == expert)
            if not len(tokens):
                continue
            w1, w2 = (
                dequantize(m, torch.float32, experts=slice(expert, expert + 1))[0].double()
                for m in (packed.gate_up, packed.down)
            )
            stored = torch.arange(2 * F, device="cuda").view(-1, 8, 2).transpose(1, 2).reshape(-1)
            b1, f1 = torch.empty_like(packed.gate_up_bias[expert]), torch.empty_like(packed.gate_up_lora.b[expert])
            b1[stored], f1[stored] = packed.gate_up_bias[expert], packed.gate_up_lora.b[expert]
            w1 = w1 + 2 * f1.double() @ packed.gate_up_lora.a[expert].double()
            w2 = w2 + 2 * packed.down_lora.b[expert].double() @ packed.down_lora.a[expert].double()
            inner = reference.swiglu(hidden[tokens].double() @ w1.mT + b1, alpha=1.702, limit=7.0)
            want[tokens] += routing.weights[tokens, place, None].double() * (inner @ w2.mT + packed.down_bias[expert])

        def error(x):
            return ((x - want).norm() / want.norm()).item()

        print(
            f"check {rows}: decode {error(got):.2e} prefill {error(plain):.2e} finite {bool(want.isfinite().all())}",
            flush=True,
        )
        others = {}
        for other in PLANS:
            same = Plan(other.rows, other.tokens, other.few, other.gate_up, other.down)
            again = route(
                torch.randn(rows, E, device="cuda", generator=torch.Generator("cuda").manual_seed(3)),
                top_k=4,
                tile=other.tokens,
            )
            out = experts_decode(hidden, again, packed, plan=same)
            others[other.rows] = out
        first = next(iter(others.values()))
        assert all(torch.equal(out, first) for out in others.values()), "plans differ"
        again = experts_decode(hidden, routing, packed)
        assert torch.equal(partials, again), "two runs differ"
        assert error(got) < 1e-2


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    started = time.time()
    jobs = [(rows, *v) for rows in (1, 16, 64, 256) for v in variants(rows)]
    pool = multiprocessing.get_context("spawn").Pool(14)
    pending = pool.map_async(compile_one, jobs, chunksize=1)
    layers = [layer(i) for i in range(LAYERS)]
    check(layers)
    failures = pending.get(timeout=240)
    pool.terminate()
    for job, failure in zip(jobs, failures, strict=True):
        if failure:
            print("FAILED", job, failure)
    print(f"compiled {len(jobs)} variants at {time.time() - started:.0f} s", flush=True)
    results = []
    for job, failure in zip(jobs, failures, strict=True):
        if failure:
            continue
        rows, tokens, few, which, launch = job
        ms = graph_ms(work(layers, *job)) / LAYERS
        hit = statistics.mean(inputs(rows, i, tokens)[1].indices.unique().numel() for i in range(LAYERS))
        share = read_share(hit, 2 * F * D if which == "up" else D * F, ms * 1e3)
        results.append(
            {
                "rows": rows,
                "tokens": tokens,
                "few": few,
                "which": which,
                "launch": list(launch),
                "us": round(ms * 1e3, 2),
                "share": round(share, 3),
            }
        )
    for rows in (1, 16, 64, 256):
        for which in ("up", "down"):
            found = sorted((r for r in results if r["rows"] == rows and r["which"] == which), key=lambda r: r["us"])
            print(f"-- {rows} {which}")
            for r in found[:7]:
                print(
                    f"   {r['us']:8.2f} us {100 * r['share']:5.1f} %  tokens {r['tokens']} few {r['few']} {r['launch']}"
                )
    # gate_up and down with today's plans, and the whole chain.
    for rows in (1, 16, 64, 256):
        pair, share = measure_pair(layers, rows)
        results.append({"rows": rows, "pair_us": round(pair, 2), "share": round(share, 3)})
        print(f"pair {rows}: {pair:.1f} us, {100 * share:.1f} % of {REFERENCE_TB_S} TB/s")
    for rank in (0, R):
        chained = layers if not rank else [layer(i, rank=R) for i in range(LAYERS)]
        for rows in (1, 16, 64, 256):
            g = torch.Generator("cuda").manual_seed(rows)
            router = torch.randn(E, D, device="cuda", generator=g).bfloat16() * 0.02
            bias, weight = torch.zeros(E, device="cuda").bfloat16(), torch.ones(D, device="cuda")
            residual = torch.randn(rows, D, device="cuda", generator=g)
            hiddens = [torch.randn(rows, D, device="cuda", generator=g).bfloat16() for _ in layers]

            def chain():
                for packed, hidden in zip(chained, hiddens, strict=True):
                    routing = route(router_logits(hidden, router, bias), top_k=4, tile=plan_for(rows).tokens)
                    combine_norm(
                        residual,
                        experts_decode(hidden, routing, packed),
                        routing.weights,
                        weight,
                        dtype=torch.bfloat16,
                        eps=1e-5,
                    )

            ms = graph_ms(chain) / LAYERS
            parts = {
                "router": graph_ms(lambda: [router_logits(h, router, bias) for h in hiddens]) / LAYERS,
                "route": graph_ms(
                    lambda: [
                        route(torch.zeros(rows, E, device="cuda"), top_k=4, tile=plan_for(rows).tokens) for _ in hiddens
                    ]
                )
                / LAYERS,
            }
            results.append({"rows": rows, "rank": rank, "chain_us": ms * 1e3, **{k: v * 1e3 for k, v in parts.items()}})
            print("chain", rows, "rank", rank, f"{ms * 1e3:.1f} us", {k: round(v * 1e3, 2) for k, v in parts.items()})
    hidden = torch.randn(4096, D, device="cuda").bfloat16()
    logits = torch.randn(4096, E, device="cuda")
    values, indices = logits.topk(4)
    experts_prefill(hidden, indices, values.softmax(-1), layers[0])
    torch.cuda.synchronize()
    t = time.time()
    for packed in layers:
        experts_prefill(hidden, indices, values.softmax(-1), packed)
    torch.cuda.synchronize()
    print(f"prefill 4096 tokens: {(time.time() - t) / LAYERS * 1e3:.2f} ms a layer")
    write_figures(Path(args.out), "tune_experts", {"reference_tb_s": REFERENCE_TB_S, "results": results})
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
