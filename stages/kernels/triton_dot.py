"""The product that this project's Triton kernels share."""

import os

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(left, right, acc):
    """acc + left right, both of one type; float32 is not rounded to tf32."""
    if INTERPRETED:  # the interpreter multiplies bfloat16 as the integers that hold it
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")
