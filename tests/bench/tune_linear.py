"""Sweeps the tiles of the decode step's dense products, on a card: python tests/bench/tune_linear.py --out FILE

Every variant must give the bits of the first; cuBLAS stands beside them, and how many of its results are equal too.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from stages.kernels.linear import Tile, linear  # noqa: E402

SHAPES = {"qkv": (5168, 2880), "o": (2896, 4096), "lm_head": (201088, 2880)}
ROWS = (1, 16, 64, 256)
TILES = {
    1: [(16, 8, 128, 1, 4), (16, 8, 128, 1, 6), (16, 8, 256, 1, 4), (32, 8, 128, 2, 4), (32, 8, 64, 2, 6), (16, 8, 256, 2, 3),
        (64, 8, 64, 4, 5), (32, 8, 128, 1, 4), (16, 8, 512, 2, 3), (64, 8, 128, 4, 4), (16, 8, 256, 4, 4), (32, 8, 256, 4, 3)],
    16: [(64, 16, 64, 4, 5), (64, 16, 128, 4, 4), (32, 16, 128, 2, 4), (128, 16, 64, 4, 5), (64, 16, 64, 4, 8), (32, 16, 128, 4, 5),
         (64, 16, 256, 4, 3), (32, 16, 256, 4, 3), (16, 16, 256, 2, 4), (32, 16, 64, 2, 6)],
    64: [(64, 64, 64, 4, 4), (64, 64, 64, 4, 6), (64, 64, 128, 4, 3), (128, 64, 64, 4, 4), (128, 64, 64, 8, 4), (64, 32, 64, 4, 5),
         (128, 64, 128, 8, 3), (64, 64, 128, 4, 4)],
    256: [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4), (64, 256, 64, 4, 3),
          (64, 256, 64, 8, 4), (128, 128, 64, 4, 4), (64, 128, 128, 4, 3)],
}  # fmt: skip
COPIES = {"qkv": 12, "o": 12, "lm_head": 1}


def draw(*shape, seed):
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=g).bfloat16()


def compile_one(job):
    name, rows, tile = job
    try:
        outputs, inputs = SHAPES[name]
        linear(draw(rows, inputs, seed=1), torch.empty(outputs, inputs, dtype=torch.bfloat16, device="cuda"), dtype=torch.float32, tile=Tile(0, *tile))
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
    print(f"compiled {len(jobs)} at {time.time() - started:.0f} s", {job: e for job, e in failures.items() if e}, flush=True)
    found = []
    for name, (outputs, inputs) in SHAPES.items():
        weights = [draw(outputs, inputs, seed=i) * 0.02 for i in range(COPIES[name])]
        x = draw(256, inputs, seed=99)
        canonical = linear(x[:1], weights[0], dtype=torch.float32, tile=Tile(0, *TILES[1][0]))
        for rows in ROWS:
            results = []
            for tile in TILES[rows]:
                if failures[name, rows, tile]:
                    continue
                first = linear(x[:rows], weights[0], dtype=torch.float32, tile=Tile(0, *tile))[:1]
                us = graph_us(lambda: [linear(x[:rows], w, dtype=torch.float32, tile=Tile(0, *tile)) for w in weights]) / len(weights)
                results.append((us, tile, (first == canonical).float().mean().item()))
            first = torch.mm(x[:rows], weights[0].mT, out_dtype=torch.float32)[:1]
            us = graph_us(lambda: [torch.mm(x[:rows], w.mT, out_dtype=torch.float32) for w in weights]) / len(weights)
            same = (first == canonical).float().mean().item()
            print(f"-- {name} {rows}: cuBLAS {us:.2f} us, equal {same:.4f}")
            for us_, tile, equal in sorted(results)[:4]:
                print(f"   {us_:8.2f} us {outputs * inputs * 2 / us_ / 4.3e6:6.1%} {tile} equal {equal:.4f}")
            print("   all equal:", all(equal == 1 for _, _, equal in results), flush=True)
            found.append({"shape": name, "rows": rows, "cublas_us": us, "cublas_equal": same, "tiles": sorted(results)})
    wide = draw(8192, 2880, seed=5)
    w = draw(5168, 2880, seed=0) * 0.02
    one = linear(wide[:1], w, dtype=torch.float32, tile=Tile(0, *TILES[1][0]))
    for rows in (100, 700, 4096, 6400, 8192):
        print("cuBLAS", rows, "equal", (torch.mm(wide[:rows], w.mT, out_dtype=torch.float32)[:1] == one).float().mean().item())
    Path(args.out).write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "results": found}, indent=1))
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
