"""The GPU engine's loop, pages and slots on the CPU, against the CPU engine and against a model that remembers."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.config import UserError
from stages.engine import Completion, Engine, Request, SamplingParams
from stages.engine import paged_run as paged_run_module
from stages.engine.graphs import LADDER, bucket_of
from stages.engine.paged_engine import PagedEngine
from stages.engine.pages import Pages, pages_needed
from stages.engine.sequence import Sequence as Running
from tests.plain_step import PlainStep
from tests.remembering_step import (
    VOCABULARY,
    RememberingStep,
    assert_as_expected,
    budget,
    remembering_engine,
    requests_of,
    run,
)
from tests.test_engine import make_policy, prompt_of


def test_greedy_and_sampled_completions_equal_the_cpu_engines(random_checkpoint: Path) -> None:
    policy = make_policy(random_checkpoint)
    requests = []
    for index, length in enumerate((130, 130, 7, 300, 128, 128)):
        sampling = SamplingParams(
            max_new_tokens=6 + index, temperature=index % 3 * 0.6, seed=index, top_k=index % 2 * 9
        )
        requests.append(Request(completion_id=str(index), prompt_ids=prompt_of(length), sampling=sampling))
    paged = PagedEngine(policy, max_slots=4, max_new_tokens=16, step=PlainStep)
    wanted = Engine(policy, max_slots=4, max_new_tokens=16).run(requests)
    for completion, want in zip(run(paged, requests), wanted, strict=True):
        assert completion.completion_ids == want.completion_ids
        np.testing.assert_allclose(completion.engine_logprobs, want.engine_logprobs, atol=1e-4)


@pytest.mark.parametrize("pages", [6, 9, 40])
def test_many_requests_of_random_lengths_in_few_slots_and_few_pages_are_all_completed(pages: int) -> None:
    requests = requests_of(120, seed=pages)
    engine = remembering_engine(cache_bytes=budget(pages))
    assert_as_expected(run(engine, requests), requests)


def test_requests_of_a_prompt_that_do_not_stand_together_are_completed_too() -> None:
    requests = requests_of(90, seed=3, group=3)
    random.Random(0).shuffle(requests)
    assert_as_expected(run(remembering_engine(cache_bytes=budget(9)), requests), requests)


def test_a_prompt_is_computed_once_for_all_its_completions_however_few_slots() -> None:
    requests = [
        Request(
            completion_id=f"{prompt}-{sample}",
            prompt_ids=(prompt,) * 200,
            sampling=SamplingParams(max_new_tokens=10 + sample, seed=sample),
        )
        for prompt in range(3)
        for sample in range(8)
    ]
    engine = remembering_engine(max_slots=3)
    assert_as_expected(run(engine, requests), requests)
    assert engine.stats.prefill_tokens == 3 * 200
    assert engine._step.prefills == [(200, 1, 0)] * 3  # type: ignore[union-attr]


def test_waiting_prompts_are_packed_into_one_prefill_and_long_ones_come_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paged_run_module, "PREFILL_TOKENS", 100)
    lengths = (30, 40, 30, 1, 250, 99, 300)
    requests = [
        Request(
            completion_id=str(index),
            prompt_ids=tuple((index + place) % VOCABULARY for place in range(length)),
            sampling=SamplingParams(max_new_tokens=40, seed=index),
        )
        for index, length in enumerate(lengths)
    ]
    engine = remembering_engine(max_slots=7)
    assert_as_expected(run(engine, requests), requests)
    assert engine._step.prefills == [  # type: ignore[union-attr]
        (100, 3, 0),
        (1, 1, 0),
        *((100, 1, 0), (100, 1, 100), (50, 1, 200)),
        (99, 1, 0),
        *((100, 1, 0), (100, 1, 100), (100, 1, 200)),
    ]


def test_a_tail_of_few_sequences_takes_the_small_steps_of_the_ladder() -> None:
    requests = [
        Request(completion_id=str(n), prompt_ids=(n,), sampling=SamplingParams(max_new_tokens=4 * (n + 1), seed=n))
        for n in range(6)
    ]
    engine = remembering_engine(max_slots=6)
    assert_as_expected(run(engine, requests), requests)
    step = engine._step
    assert isinstance(step, RememberingStep)
    # Tokens 2..4 of all six, then one sequence less every 4 steps; a length is known ahead, so no step is wasted.
    assert step.batches == [6] * 3 + [6] * 4 + [4] * 8 + [2] * 4 + [1] * 4
    assert engine.stats.decode_steps == len(step.batches)
    assert engine.stats.decode_tokens == sum(4 * (n + 1) - 1 for n in range(6))


def test_buckets_are_the_ladders_up_to_the_number_of_slots() -> None:
    assert [bucket_of(n, 64) for n in (1, 2, 3, 5, 9, 17, 25, 33, 49, 64)] == [1, 2, 4, 8, 16, 24, 32, 48, 64, 64]
    assert [bucket_of(n, 20) for n in (16, 17, 20)] == [16, 20, 20]
    assert bucket_of(2000, 3000) == 3000
    assert list(LADDER) == sorted(set(LADDER))


def test_steps_report_what_they_sampled_and_completions_come_as_they_end() -> None:
    requests = requests_of(30)
    sampled: list[int] = []
    order: list[str] = []
    engine = remembering_engine()
    completions = engine.run(requests, lambda c: order.append(c.completion_id), sampled.append)
    assert sum(sampled) == sum(len(c.completion_ids) for c in completions)
    assert min(sampled) > 0
    assert sorted(order) == [r.completion_id for r in requests]
    assert order != sorted(order)


def test_a_request_that_fits_no_empty_cache_is_refused_before_anything_is_sampled() -> None:
    short = Request(completion_id="short", prompt_ids=(1,) * 10, sampling=SamplingParams(max_new_tokens=10))
    long = Request(completion_id="long", prompt_ids=(1,) * 300, sampling=SamplingParams(max_new_tokens=85))
    assert pages_needed(long) == 4
    engine = remembering_engine(cache_bytes=budget(3))
    with pytest.raises(UserError, match="512 tokens"):
        run(engine, [short, long])
    assert engine._step.prefills == []  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="request long needs 4 pages"):
        Pages([short, long], num_pages=4)
    fits = remembering_engine(cache_bytes=budget(4))
    assert_as_expected(run(fits, [short, long]), [short, long])


def test_a_full_cache_makes_the_next_request_wait_and_no_other_overtakes_it() -> None:
    def request(name: str, length: int, new: int) -> Request:
        return Request(completion_id=name, prompt_ids=(3,) * length, sampling=SamplingParams(max_new_tokens=new))

    requests = [request("a", 100, 150), request("b", 130, 100), request("c", 600, 100), request("d", 10, 5)]
    order: list[str] = []
    engine = remembering_engine(cache_bytes=budget(6))
    completions = engine.run(requests, lambda c: order.append(c.completion_id), lambda _: None)
    assert_as_expected(completions, requests)
    assert order == ["b", "a", "c", "d"]  # c needs all six pages; d, which would have fitted beside a, stands behind it
    small = remembering_engine(cache_bytes=budget(3))
    with pytest.raises(UserError, match="768 tokens"):
        run(small, requests)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_gives_the_cache_back_and_the_next_run_is_as_if_nothing_had_been(
    error: type[BaseException],
) -> None:
    requests = requests_of(24)
    engine = remembering_engine(cache_bytes=budget(20))
    seen = []

    def interrupt(completion: Completion) -> None:
        seen.append(completion)
        if len(seen) == 5:
            raise error("stop here")

    with pytest.raises(error, match="stop here"):
        engine.run(requests, interrupt, lambda _: None)
    assert engine._cache is None
    assert_as_expected(run(engine, requests), requests)
    assert engine._cache is None
    assert engine.stats.cache_bytes <= budget(20)


def test_a_run_takes_no_more_pages_than_it_can_use() -> None:
    engine = remembering_engine(cache_bytes=budget(100_000))
    requests = [
        Request(completion_id=str(n), prompt_ids=(n // 2,) * 200, sampling=SamplingParams(max_new_tokens=57))
        for n in range(8)
    ]
    run(engine, requests[:6])
    assert engine.stats.cache_bytes == budget(6 * 3)
    run(engine, requests[:2])
    assert engine.stats.cache_bytes == budget(2 * 3)
    run(engine, requests)  # two wait: four prompts may have to be kept, in two pages each
    assert engine.stats.cache_bytes == budget(6 * 3 + 4 * 2)


def test_logits_that_are_not_finite_are_an_error_that_names_the_completion() -> None:
    engine = remembering_engine()
    requests = requests_of(6)
    run(engine, requests)
    step = engine._step
    assert isinstance(step, RememberingStep)
    step.prefill = lambda ids, starts, *_: torch.full((len(starts), VOCABULARY), torch.nan)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="token 0 of completion 000") as caught:
        run(engine, requests)
    assert "model.dtype=bfloat16" in caught.value.hint


def sequence(prompt: int, length: int, new: int) -> Running:
    params = SamplingParams(max_new_tokens=new)
    return Running(Request(completion_id=f"{prompt}", prompt_ids=(prompt,) * length, sampling=params))


def test_whole_prompt_pages_are_shared_and_all_pages_come_back() -> None:
    group = [sequence(1, 300, 50) for _ in range(5)]
    pages = Pages([s.request for s in group], num_pages=12)
    for one in group[:3]:
        assert pages.reserve(one, alone=False)
    assert [one.pages[:2] for one in group[:3]] == [group[0].pages[:2]] * 3
    assert len({page for one in group[:3] for page in one.pages}) == 2 + 3
    assert all(0 not in one.pages for one in group[:3])
    kept = pages.keep(group[0].request.prompt_ids)
    assert kept is not None
    assert kept.pages[:2] == group[0].pages[:2]
    assert kept.pages[2] not in {page for one in group[:3] for page in one.pages}
    pages.end_round()
    for one in group[:3]:
        pages.release(one)
    assert pages.num_free == 11 - 3  # the kept prompt's two whole pages and its copy
    for one in group[3:]:
        assert pages.reserve(one, alone=False)
        assert one.pages[:2] == kept.pages[:2]
    assert not pages.leaders
    pages.end_round()
    assert not pages.kept
    for one in group[3:]:
        pages.release(one)
    assert pages.num_free == 11


def test_kept_prompts_give_way_when_nothing_runs_and_their_pages_are_needed() -> None:
    first, again, large = sequence(1, 300, 50), sequence(1, 300, 50), sequence(2, 500, 12)
    pages = Pages([s.request for s in (first, again, large)], num_pages=5)
    assert pages.reserve(first, alone=True)
    assert pages.keep(first.request.prompt_ids)
    pages.end_round()
    pages.release(first)
    assert pages.num_free == 1
    assert not pages.reserve(large, alone=False)
    assert pages.kept
    assert pages.reserve(large, alone=True)
    assert not pages.kept
    assert pages.num_free == 0
    pages.end_round()
    pages.release(large)
    assert pages.reserve(again, alone=True)
    assert pages.leaders == {again.request.prompt_ids: again}  # to be computed once more
