"""Sweeps the tiles of the decode step's dense products, on a card: python tests/bench/tune_linear.py --out FILE

Every variant must give the bits of the first; cuBLAS stands beside them, and how many of its results are equal too.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from stages.kernels.linear import Tile, linear_parts
from tests.bench.tuning import write_figures

SHAPES = {"qkv": (5168, 2880), "o": (2896, 4096), "lm_head": (201088, 2880)}
PARTS = {"qkv": 1, "o": 2, "lm_head": 1}
ROWS = (1, 16, 64)
TILES = {
    1: [
        *((64, 8, 128, 4, 4, early) for early in (False, True)),
        *((32, 8, 256, 4, 3, early) for early in (False, True)),
        (16, 8, 512, 2, 3, True),
        (32, 8, 128, 4, 6, True),
        (64, 8, 256, 4, 3, True),
        (64, 8, 64, 4, 6, True),
    ],
    16: [
        *((64, 16, 64, 4, 8, early) for early in (False, True)),
        *((64, 16, 128, 4, 5, early) for early in (False, True)),
        (16, 16, 256, 2, 4, False),
        (32, 16, 128, 4, 5, True),
    ],
    64: [
        *((64, 64, 128, 4, 4, early) for early in (False, True)),
        *((64, 64, 64, 4, stages, False) for stages in (6, 8)),
        (64, 32, 128, 4, 4, False),
        (128, 64, 64, 4, 6, False),
    ],
}
COPIES = {"qkv": 12, "o": 12, "lm_head": 1}


def draw(*shape, seed):
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=g).bfloat16()


def compile_one(job):
    name, rows, tile = job
    try:
        outputs, inputs = SHAPES[name]
        linear_parts(
            draw(rows, inputs, seed=1),
            torch.empty(outputs, inputs, dtype=torch.bfloat16, device="cuda"),
            tile=Tile(0, *tile),
            parts=PARTS[name],
        )
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    return None


def graph_us(function, repeats=15):
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[3:])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    started = time.time()
    jobs = [(name, rows, tile) for name in SHAPES for rows in ROWS for tile in TILES[rows]]
    with multiprocessing.get_context("spawn").Pool(12) as pool:
        failures = dict(zip(jobs, pool.map(compile_one, jobs, chunksize=1), strict=True))
    print(
        f"compiled {len(jobs)} at {time.time() - started:.0f} s",
        {job: e for job, e in failures.items() if e},
        flush=True,
    )
    found = []
    for name, (outputs, inputs) in SHAPES.items():
        weights = [draw(outputs, inputs, seed=i) * 0.02 for i in range(COPIES[name])]
        x = draw(256, inputs, seed=99)
        canonical = linear_parts(x[:1], weights[0], tile=Tile(0, *TILES[1][0]), parts=PARTS[name])
        for rows in ROWS:
            results = []
            for tile in TILES[rows]:
                if failures[name, rows, tile]:
                    continue
                first = linear_parts(x[:rows], weights[0], tile=Tile(0, *tile), parts=PARTS[name])[:, :1]
                us = graph_us(
                    lambda: [linear_parts(x[:rows], w, tile=Tile(0, *tile), parts=PARTS[name]) for w in weights]
                ) / len(weights)
                results.append((us, tile, torch.equal(first, canonical)))
            us = graph_us(lambda: [torch.mm(x[:rows], w.mT, out_dtype=torch.float32) for w in weights]) / len(weights)
            print(f"-- {name} {rows}: cuBLAS {us:.2f} us")
            for us_, tile, equal in sorted(results)[:4]:
                print(f"   {us_:8.2f} us {outputs * inputs * 2 / us_ / 4.3e6:6.1%} {tile} equal {equal}")
            print("   all equal:", all(equal for _, _, equal in results), flush=True)
            found.append({"shape": name, "rows": rows, "cublas_us": us, "tiles": sorted(results)})
    for name, (outputs, inputs) in SHAPES.items():  # the rows that cuBLAS gets in a step and in a prefill
        wide, w = draw(8192, inputs, seed=5), draw(outputs, inputs, seed=0) * 0.02
        one = linear_parts(wide[:1], w, tile=Tile(0, *TILES[1][0]), parts=PARTS[name])
        for rows in (97, 128, 192, 256, 512, 700, 1024, 4096, 6400, 8192):
            if name == "lm_head" and rows > 1024:
                continue
            print(
                f"cuBLAS {name} {rows} equal", torch.equal(linear_parts(wide[:rows], w, parts=PARTS[name])[:, :1], one)
            )
    write_figures(Path(args.out), "tune_linear", {"results": found})
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
