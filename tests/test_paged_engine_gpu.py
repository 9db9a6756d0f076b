"""What only a card shows of the GPU engine: captured graphs, memory given back, nothing compiled again."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stages.engine import Completion, Engine, Request, SamplingParams
from stages.engine.device_memory import CacheMemory, VirtualMemory, cache_memory
from stages.engine.paged_engine import PagedEngine
from stages.model.checkpoint import Checkpoint
from stages.model.gpt_oss import build
from stages.model.policy import Policy
from tests.remembering_step import (
    RememberingStep,
    assert_as_expected,
    assert_routes_as_expected,
    budget,
    remembering_engine,
    requests_of,
    run,
)
from tests.test_engine import prompt_of

pytestmark = pytest.mark.gpu


@pytest.fixture
def policy(random_checkpoint: Path) -> Policy:
    """A bfloat16 policy on the card whose adapter matters."""
    model = build(Checkpoint(random_checkpoint), experts="mxfp4", dtype=torch.bfloat16, device="cuda")
    policy = Policy(model, None, lora_rank=4, lora_alpha=8.0, seed=0, source="", checkpoint_digests={})
    change_adapter(policy, seed=5)
    return policy


def change_adapter(policy: Policy, *, seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.parameters():
            if name.endswith(".b"):
                parameter.normal_(0, 0.05, generator=generator)


def requests_to(policy: Policy, count: int, *, seed: int = 0, longest: int = 600) -> list[Request]:
    draw = random.Random(seed)
    return [
        Request(
            completion_id=f"{index:03d}",
            prompt_ids=prompt_of(draw.randint(1, longest)),
            sampling=SamplingParams(
                max_new_tokens=draw.randint(1, 40),
                temperature=draw.choice((0.0, 1.0)),
                seed=index,
                stop_token_ids=(1, 17),
            ),
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("record_routes", [False, True])
@pytest.mark.parametrize("pages", [6, 9, 40])
def test_graphs_that_remember_every_token_complete_120_requests_as_worked_out_by_hand(
    pages: int, record_routes: bool
) -> None:
    requests = requests_of(120, seed=pages)
    engine = remembering_engine(device="cuda", cache_bytes=budget(pages), record_routes=record_routes)
    completions = run(engine, requests)
    assert_as_expected(completions, requests)
    if record_routes:
        assert_routes_as_expected(completions)
    step = engine._step
    assert isinstance(step, RememberingStep)
    assert len(step.batches) == 2 * engine.stats.graphs  # warmed up and captured, never called for a token
    assert engine.stats.decode_steps > 10 * engine.stats.graphs


def test_graphs_outlive_the_cache_and_the_second_run_captures_nothing() -> None:
    engine = remembering_engine(device="cuda")
    assert isinstance(engine._memory, VirtualMemory), "this card has no virtual memory: graphs are captured each run"
    first, second = requests_of(60, seed=1), requests_of(60, seed=2)
    assert_as_expected(run(engine, first), first)
    held = engine.stats.graphs
    assert engine._memory.held_bytes == 0
    assert_as_expected(run(engine, second), second)
    assert engine.stats.graphs == held
    assert engine.stats.capture_s == 0
    assert_as_expected(run(engine, first), first)


def test_without_virtual_memory_graphs_go_with_the_cache_and_are_captured_again() -> None:
    engine = remembering_engine(device="cuda", memory=CacheMemory(torch.device("cuda")))
    for seed in (1, 2):
        requests = requests_of(60, seed=seed)
        assert_as_expected(run(engine, requests), requests)
        assert engine.stats.capture_s > 0


def test_memory_put_behind_the_same_addresses_is_zero_and_goes_back_to_the_card() -> None:
    memory = cache_memory(torch.device("cuda"))
    assert isinstance(memory, VirtualMemory)
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    first = memory.zeros("keys", (1 << 20, 8, 64), torch.bfloat16)
    assert first.device.type == "cuda"
    assert not first.any()
    first.fill_(3.0)
    assert before - torch.cuda.mem_get_info()[0] >= first.nbytes
    assert memory.held_bytes >= first.nbytes == 1 << 30
    address = first.data_ptr()
    torch.cuda.synchronize()
    memory.give_back()
    torch.cuda.empty_cache()
    assert before - torch.cuda.mem_get_info()[0] < 64 << 20
    again = memory.zeros("keys", (1 << 21, 8, 64), torch.bfloat16)  # larger than the first time
    assert again.data_ptr() == address
    assert not again.any()
    torch.cuda.synchronize()
    memory.close()
    with pytest.raises(torch.OutOfMemoryError):
        cache_memory(torch.device("cuda")).zeros("keys", (1 << 40,), torch.uint8)


def test_an_exception_gives_the_memory_back() -> None:
    engine = remembering_engine(device="cuda")
    requests = requests_of(24)

    def interrupt(completion: Completion) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run(requests, interrupt, lambda _: None)
    assert engine._memory.held_bytes == 0
    assert_as_expected(run(engine, requests), requests)


def test_replayed_graphs_sample_and_record_what_the_same_step_does_without_them(policy: Policy) -> None:
    requests = requests_to(policy, 40)
    graphs = PagedEngine(policy, max_slots=8, max_new_tokens=40, record_routes=True)
    eager = PagedEngine(policy, max_slots=8, max_new_tokens=40, record_routes=True, graphs=False)
    replayed, called = run(graphs, requests), run(eager, requests)
    assert replayed == called == run(PagedEngine(policy, max_slots=8, max_new_tokens=40), requests)
    for one, other in zip(replayed, called, strict=True):
        assert one.routes is not None
        assert other.routes is not None
        assert torch.equal(one.routes, other.routes)
    assert graphs.stats.graphs > 0
    assert eager.stats.graphs == 0


def test_a_changed_adapter_changes_what_replayed_graphs_sample(policy: Policy) -> None:
    requests = requests_to(policy, 12)
    engine = Engine(policy, max_slots=8, max_new_tokens=40)
    before = engine.run(requests)
    change_adapter(policy, seed=6)
    after = engine.run(requests)
    assert engine.stats is not None
    assert engine.stats.capture_s == 0
    assert after != before
    assert after == Engine(policy, max_slots=8, max_new_tokens=40).run(requests)
    with policy.adapter_disabled():
        assert engine.run(requests) not in (before, after)
    assert engine.run(requests) == after


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The names of Triton kernels compiled or loaded while the test runs."""
    import triton

    @triton.jit
    def unseen(x):  # type: ignore[no-untyped-def]
        pass

    names: list[str] = []

    def note(*, fn: object, **_: object) -> None:
        names.append(str(getattr(fn, "name", fn)))

    earlier = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = note
    unseen[(1,)](0)
    assert names, "the hook sees compilations"
    yield names
    triton.knobs.runtime.jit_post_compile_hook = earlier


def test_nothing_is_compiled_again_whatever_lengths_and_batch_sizes_come(policy: Policy, compiled: list[str]) -> None:
    from torch._dynamo.utils import counters

    engine = Engine(policy, max_slots=8, max_new_tokens=40)
    engine.run(requests_to(policy, 40, seed=1, longest=1500))
    engine.run(requests_to(policy, 1, seed=1))
    compiled.clear()
    traced = dict(counters["stats"])
    for seed in range(2, 6):
        engine.run(requests_to(policy, 3 * seed, seed=seed, longest=300 * seed))
    assert compiled == []
    assert dict(counters["stats"]) == traced


def test_the_cache_is_given_back_after_each_run_and_what_stays_does_not_grow(policy: Policy) -> None:
    engine = Engine(policy, max_slots=8, max_new_tokens=40)
    held = []
    for seed in range(4):
        engine.run(requests_to(policy, 20, seed=seed))
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[1] + (1 << 20)
    assert engine.stats is not None
    assert engine.stats.cache_bytes > 1 << 20
    engine.close()
    assert torch.cuda.memory_allocated() < held[-1]
