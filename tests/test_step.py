"""The GPU engine's step, its kernels in Triton's interpreter, against the CPU engine."""

from pathlib import Path

import pytest
import torch

from stages.engine import Engine, Request, SamplingParams
from stages.engine.paged_engine import PagedEngine
from stages.kernels.launch import interpreted
from tests.test_engine import make_policy, prompt_of

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")


@pytest.mark.parametrize("experts", ["mxfp4", "dequantized"])
def test_the_step_samples_what_the_cpu_engine_samples(random_checkpoint: Path, experts: str) -> None:
    policy = make_policy(random_checkpoint, experts=experts)
    requests = [
        Request(
            completion_id=str(index),
            prompt_ids=prompt_of(length),
            sampling=SamplingParams(max_new_tokens=3, temperature=float(index % 2), seed=index),
        )
        for index, length in enumerate((126, 5))
    ]
    expected = Engine(policy, max_slots=2, max_new_tokens=3).run(requests)
    paged = PagedEngine(policy, max_slots=2, max_new_tokens=3)
    found = paged.run(requests, lambda _: None, lambda _: None)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.completion_ids == theirs.completion_ids
        torch.testing.assert_close(
            torch.tensor(ours.engine_logprobs), torch.tensor(theirs.engine_logprobs), atol=2e-5, rtol=0
        )
