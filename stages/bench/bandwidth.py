"""How fast the card reads its memory: a sum over several gigabytes, each byte read once."""

import statistics

import torch

from stages.kernels.triton_read import sum_kernel

BYTES = 8 << 30  # far more than any cache on the card
BLOCK = 4096  # int32 values a program reads at once
ROUNDS = 16  # how often it does


def read_tb_s(device: torch.device, *, repeats: int = 10) -> float:
    """TB/s (10^12 bytes), the median of so many sums over 8 GiB, or over a quarter of what is free if that is less."""
    free, _ = torch.cuda.mem_get_info(device)
    programs = min(BYTES, free // 4) // (4 * BLOCK * ROUNDS)
    source = torch.ones(programs * BLOCK * ROUNDS, dtype=torch.int32, device=device)
    sums = torch.empty(programs, dtype=torch.int32, device=device)
    seconds = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        sum_kernel[(programs,)](source, sums, BLOCK=BLOCK, ROUNDS=ROUNDS, num_warps=8)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    assert bool((sums == BLOCK * ROUNDS).all())
    return source.nbytes / statistics.median(seconds[2:]) / 1e12
