"""A small exact training that tests of `flexsink bench update` share."""

import dataclasses

import torch

from stages.bench.update_step import Setting, Training, open_policy
from stages.model.shapes import SHAPES

CPU = torch.device("cpu")
TINY = dataclasses.replace(SHAPES["tiny"], num_layers=2)
EXACT = Setting(shape=TINY, rank=4, dtype="fp32", lora_dtype="fp32", optimizer="adamw", learning_rate=1e-2, seed=1)


def exact_training() -> Training:
    """Of the tiny shape in float32 on the CPU."""
    return Training(open_policy(EXACT, device=CPU), EXACT)
