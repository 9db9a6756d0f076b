"""The Triton kernel that reads memory as fast as the card can, for measurements."""

import triton
import triton.language as tl


@triton.jit
def sum_kernel(source, sums, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """sums[p] = the sum of the p-th stretch of BLOCK * ROUNDS values."""
    program = tl.program_id(0)
    start = program.to(tl.int64) * (BLOCK * ROUNDS)
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for turn in range(ROUNDS):
        total += tl.load(source + start + turn * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums + program, tl.sum(total))
