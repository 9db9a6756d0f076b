"""The GPU engine's step, its kernels in Triton's interpreter, against the CPU engine."""

from pathlib import Path

import pytest
import torch

from stages.engine import Engine, Request, SamplingParams
from stages.engine.paged_engine import PagedEngine
from stages.kernels.launch import interpreted
from tests.random_gpt_oss import write_checkpoint
from tests.test_engine import make_policy, prompt_of

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")


@pytest.mark.parametrize(("experts", "dense"), [("mxfp4", "full"), ("dequantized", "nf4")])
def test_the_step_samples_what_the_cpu_engine_samples_by_the_same_experts(
    tmp_path: Path, experts: str, dense: str
) -> None:
    small = write_checkpoint(tmp_path, num_hidden_layers=2, intermediate_size=64)
    policy = make_policy(small, experts=experts, dense=dense)
    requests = [
        Request(
            completion_id=str(index),
            prompt_ids=prompt_of(length),
            sampling=SamplingParams(max_new_tokens=3, temperature=float(index % 2), seed=index),
        )
        for index, length in enumerate((126, 5))
    ]
    expected = Engine(policy, max_slots=2, max_new_tokens=3, record_routes=True).run(requests)
    paged = PagedEngine(policy, max_slots=2, max_new_tokens=3, record_routes=True)
    found = paged.run(requests, lambda _: None, lambda _: None)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.completion_ids == theirs.completion_ids
        torch.testing.assert_close(
            torch.tensor(ours.engine_logprobs), torch.tensor(theirs.engine_logprobs), atol=2e-5, rtol=0
        )
        assert ours.routes is not None
        assert theirs.routes is not None
        assert torch.equal(ours.routes.sort(-1).values, theirs.routes.sort(-1).values)
