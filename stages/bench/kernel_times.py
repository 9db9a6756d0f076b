"""Where the time of a decode step goes: its kernels, as CUPTI saw them through PyTorch's profiler.

A graph's kernels may overlap (programmatic dependent launch), so their sum can exceed the step; the profiler slows a
step down a little. These figures say which kernel to look at, not how fast the engine is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

SHOWN = 16  # kernels told


def kernel_times(run: Callable[[int], None], *, steps: int = 8) -> list[dict[str, Any]]:
    """The kernels that take most of `run(steps)`: name, us_per_step and launches_per_step, the slowest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run(steps)
        torch.cuda.synchronize()
    found = [
        {
            "kernel": event.key[:100],
            "us_per_step": event.self_device_time_total / steps,
            "launches_per_step": event.count / steps,
        }
        for event in seen.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(found, key=lambda kernel: -float(kernel["us_per_step"]))[:SHOWN]
