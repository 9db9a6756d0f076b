"""The engine against transformers eager, and against itself in other company."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GptOssForCausalLM

from stages.config import UserError
from stages.engine import Completion, Engine, Request, SamplingParams
from stages.engine.sampler import Sampler, uniforms
from stages.engine.scheduler import Scheduler
from stages.model.checkpoint import Checkpoint
from stages.model.gpt_oss import build
from stages.model.policy import Policy
from tests.random_gpt_oss import eager_model

BUNDLED = Path(__file__).parents[1] / "data" / "tiny"
NEAR_TIE = 1e-4  # eager's own two best logits this close: either token is right
ROUTER_TIE = 3e-6  # eager's fourth and fifth expert this close: either is right, and all that follows differs


def make_policy(
    folder: Path,
    *,
    experts: str = "dequantized",
    trained: bool = True,
    dense: str = "full",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Policy:
    """A policy of the checkpoint; `trained` gives its adapter deltas that matter."""
    model = build(Checkpoint(folder), experts=experts, dtype=dtype, dense=dense, device=device)
    policy = Policy(model, None, lora_rank=4, lora_alpha=8.0, seed=0, source=str(folder), checkpoint_digests={})
    if trained:
        generator = torch.Generator(device).manual_seed(5)
        with torch.no_grad():
            for name, parameter in policy.parameters():
                if name.endswith(".b"):
                    parameter.normal_(0, 0.05, generator=generator)
    return policy


def merged_eager(policy: Policy, folder: Path) -> GptOssForCausalLM:
    """transformers eager with the policy's deltas added into its weights: the oracle of a trained policy."""
    model = eager_model(folder)
    with torch.no_grad():
        for ours, theirs in zip(policy.model.model.layers, model.model.layers, strict=True):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                layer = getattr(ours.self_attn, name)
                getattr(theirs.self_attn, name).weight += layer.scale * layer.b @ layer.a
            for name in ("gate_up", "down"):
                factors = getattr(ours.mlp.experts, f"{name}_lora").factors()
                delta = torch.einsum("eor,eri->eio", factors.b, factors.a) * factors.scale
                getattr(theirs.mlp.experts, f"{name}_proj").add_(delta)
    return model


@pytest.fixture(scope="module")
def policy(random_checkpoint: Path) -> Policy:
    return make_policy(random_checkpoint)


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(2, 256, (length,), generator=torch.Generator().manual_seed(seed + length)).tolist())


def eager_logits(eager: GptOssForCausalLM, ids: tuple[int, ...]) -> tuple[torch.Tensor, float]:
    """Eager's logits [T, V] and the smallest gap between a fourth and a fifth expert anywhere in it."""
    with torch.no_grad():
        output = eager(torch.tensor([ids]), use_cache=False, output_router_logits=True)
    ordered = [logits.sort(-1, descending=True).values for logits in output.router_logits]
    return output.logits[0], min(float((each[:, 3] - each[:, 4]).min()) for each in ordered)


def eager_check(logits: torch.Tensor, prompt: tuple[int, ...], completion: Completion) -> tuple[int, float]:
    """How many greedy tokens agree with eager before its first near tie, and the largest log-probability difference
    there.
    """
    logits = logits[len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1)
    largest = 0.0
    for place, token in enumerate(completion.completion_ids):
        best = logits[place].topk(2)
        if best.values[0] - best.values[1] < NEAR_TIE:
            return place, largest
        assert token == best.indices[0], f"token {place} is {token}, eager says {best.indices[0]}"
        largest = max(largest, abs(completion.engine_logprobs[place] - float(logprobs[place, token])))
    return len(completion.completion_ids), largest


def greedy(policy: Policy, prompt: tuple[int, ...], new: int) -> Completion:
    params = SamplingParams(max_new_tokens=new, temperature=0.0)
    engine = Engine(policy, max_slots=1, max_new_tokens=new)
    return engine.run([Request(completion_id="a", prompt_ids=prompt, sampling=params)])[0]


def clearly_routed(
    policy: Policy, eager: GptOssForCausalLM, length: int, new: int
) -> tuple[tuple[int, ...], Completion, torch.Tensor]:
    """A prompt on which no router is near a tie, its greedy completion, and eager's logits of both."""
    for seed in range(5):
        prompt = prompt_of(length, seed)
        completion = greedy(policy, prompt, new)
        logits, gap = eager_logits(eager, prompt + completion.completion_ids)
        if gap > ROUTER_TIE:
            return prompt, completion, logits
    raise AssertionError("five prompts with router ties")


@pytest.fixture(scope="module", params=["random", "bundled"])
def pair(request: pytest.FixtureRequest, random_checkpoint: Path) -> tuple[Policy, GptOssForCausalLM]:
    """A trained policy of either model, and transformers eager with the same weights."""
    folder = random_checkpoint if request.param == "random" else BUNDLED
    policy = make_policy(folder)
    return policy, merged_eager(policy, folder)


def test_greedy_tokens_and_logprobs_equal_eager_at_every_window_edge(pair: tuple[Policy, GptOssForCausalLM]) -> None:
    policy, eager = pair
    compared = 0
    for length, new in ((1, 200), (127, 40), (128, 40), (129, 40), (513, 40), (4200, 24)):
        prompt, completion, logits = clearly_routed(policy, eager, length, new)
        count, difference = eager_check(logits, prompt, completion)
        compared += count
        assert difference < 1e-4, f"logprobs differ by {difference} at length {length}"
    assert compared > 0.99 * (200 + 4 * 40 + 24)


def test_left_padded_generate_equals_eager_row_by_row(pair: tuple[Policy, GptOssForCausalLM]) -> None:
    policy, eager = pair
    lengths = (1, 127, 128, 129, 513, 4200)
    rows = [clearly_routed(policy, eager, length, 24) for length in lengths]
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (prompt, _, _) in enumerate(rows):
        ids[row, -len(prompt) :] = torch.tensor(prompt)
        mask[row, -len(prompt) :] = 1
    engine = Engine(policy, max_slots=len(lengths), max_new_tokens=24)
    params = SamplingParams(max_new_tokens=24, temperature=0.0)
    out = engine.generate(ids, mask, sampling=params, pad_token_id=0)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    compared = 0
    for row, (prompt, alone, logits) in enumerate(rows):
        assert out[row, ids.shape[1] :].tolist() == list(alone.completion_ids)
        compared += eager_check(logits, prompt, alone)[0]
    assert compared > 0.99 * 24 * len(lengths)


def sampled(count: int, **params: object) -> list[Request]:
    """Requests of three prompts of different lengths, with different lengths of their own."""
    requests = []
    for index in range(count):
        prompt = prompt_of((40, 130, 7)[index * 3 // count])
        settings = {"max_new_tokens": 20 + index % 13, "stop_token_ids": (1, 17), "seed": index} | params
        requests.append(Request(completion_id=f"{index:03d}", prompt_ids=prompt, sampling=SamplingParams(**settings)))
    return requests


def test_a_completion_is_the_same_bits_alone_among_7_and_among_64(policy: Policy) -> None:
    engine = Engine(policy, max_slots=64, max_new_tokens=32)
    requests = sampled(64)
    among_64 = {c.completion_id: c for c in engine.run(requests)}
    for index in range(0, 64, 9):
        assert engine.run([requests[index]])[0] == among_64[requests[index].completion_id]
    assert engine.run(requests[30:37]) == [among_64[r.completion_id] for r in requests[30:37]]
    assert engine.run(requests[::-1]) == [among_64[r.completion_id] for r in requests[::-1]]


def test_refilled_slots_change_nothing(policy: Policy) -> None:
    requests = sampled(40)
    crowded = Engine(policy, max_slots=16, max_new_tokens=32)
    order: list[str] = []
    finished = crowded.run(requests, on_finished=lambda c: order.append(c.completion_id))
    assert [c.completion_id for c in finished] == [r.completion_id for r in requests]
    assert sorted(order) == sorted(r.completion_id for r in requests)
    assert order != sorted(order)  # short ones really end before long ones that were admitted earlier
    for request, completion in zip(requests[::7], finished[::7], strict=True):
        assert crowded.run([request]) == [completion]


def test_packed_experts_give_the_same_logprobs_as_dequantized_ones(random_checkpoint: Path, policy: Policy) -> None:
    packed = make_policy(random_checkpoint, experts="mxfp4")
    assert packed.weight_bytes() < 0.6 * policy.weight_bytes()
    requests = sampled(3)
    engines = [Engine(p, max_slots=3, max_new_tokens=32) for p in (policy, packed)]
    for dense, quantized in zip(*(engine.run(requests) for engine in engines), strict=True):
        assert dense.completion_ids == quantized.completion_ids
        np.testing.assert_allclose(dense.engine_logprobs, quantized.engine_logprobs, atol=1e-5)


def test_the_adapter_is_live_and_can_be_switched_off(policy: Policy, random_checkpoint: Path) -> None:
    untrained = make_policy(random_checkpoint, trained=False)
    request = sampled(1)
    with policy.adapter_disabled():
        switched_off = Engine(policy, max_slots=1, max_new_tokens=32).run(request)
    assert switched_off == Engine(untrained, max_slots=1, max_new_tokens=32).run(request)
    assert switched_off != Engine(policy, max_slots=1, max_new_tokens=32).run(request)


def test_stop_tokens_end_a_completion_and_are_part_of_it(policy: Policy) -> None:
    engine = Engine(policy, max_slots=16, max_new_tokens=200)
    params = {"max_new_tokens": 200, "stop_token_ids": tuple(range(20, 60))}
    ends = engine.run(sampled(16, **params))
    assert {c.finish_reason for c in ends} == {"stop"}
    for completion in ends:
        assert completion.completion_ids[-1] in params["stop_token_ids"]
        assert not set(completion.completion_ids[:-1]) & set(params["stop_token_ids"])
        assert len(completion.engine_logprobs) == len(completion.completion_ids)
    (cut,) = engine.run(sampled(1, max_new_tokens=3, stop_token_ids=()))
    assert (cut.finish_reason, len(cut.completion_ids)) == ("length", 3)


def sample_many(params: dict[str, float], logits: torch.Tensor, draws: int) -> np.ndarray:
    """Frequencies of each token over `draws` slots with seeds 0, 1, 2..."""
    sampler = Sampler(max_slots=draws, max_new_tokens=1, device=torch.device("cpu"))
    for slot in range(draws):
        sampler.assign(slot, SamplingParams(max_new_tokens=1, seed=slot, **params))
    tokens, _ = sampler.sample(logits.expand(draws, -1), torch.zeros(draws, dtype=torch.int64))
    return np.bincount(tokens.numpy(), minlength=logits.shape[-1]) / draws


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        # logits are log(8, 4, 2, 1, 1) / 16
        ({}, [8 / 16, 4 / 16, 2 / 16, 1 / 16, 1 / 16]),
        ({"temperature": 0.5}, [64 / 86, 16 / 86, 4 / 86, 1 / 86, 1 / 86]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_p": 0.75}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_p": 0.76}, [4 / 7, 2 / 7, 1 / 7, 0, 0]),
        ({"min_p": 0.25}, [4 / 7, 2 / 7, 1 / 7, 0, 0]),
        ({"top_k": 3, "top_p": 0.6, "min_p": 0.1}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
    ],
)
def test_tokens_come_from_the_distribution_worked_out_by_hand(params: dict[str, float], expected: list[float]) -> None:
    draws = 20_000
    logits = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0]).log()
    frequencies = sample_many(params, logits, draws)
    assert np.all(frequencies[np.array(expected) == 0] == 0)
    np.testing.assert_allclose(frequencies, expected, atol=4 * 0.5 / draws**0.5)


def test_a_logprob_is_that_of_the_distribution_sampled_from() -> None:
    sampler = Sampler(max_slots=2, max_new_tokens=1, device=torch.device("cpu"))
    sampler.assign(0, SamplingParams(max_new_tokens=1, top_k=2, seed=1))
    sampler.assign(1, SamplingParams(max_new_tokens=1, temperature=0.0))
    logits = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0]).log().expand(2, -1)
    tokens, logprobs = sampler.sample(logits, torch.zeros(2, dtype=torch.int64))
    assert logprobs[0].exp() == pytest.approx([2 / 3, 1 / 3][int(tokens[0])], rel=1e-6)
    assert logprobs[1].exp() == pytest.approx(0.5, rel=1e-6)  # greedy: temperature 1, no filter


def test_random_numbers_belong_to_the_seed_alone() -> None:
    assert np.array_equal(uniforms(7, 100)[:10], uniforms(7, 10))
    assert not np.array_equal(uniforms(7, 10), uniforms(8, 10))
    assert 0 <= uniforms(2**63 - 1, 10).min() <= uniforms(2**63 - 1, 10).max() < 1


def test_the_scheduler_refills_the_lowest_free_slot_and_frees_a_prompt_after_its_last_sequence() -> None:
    prompts = ((1,), (1,), (2,), (1,))
    requests = [
        Request(completion_id=str(i), prompt_ids=p, sampling=SamplingParams(max_new_tokens=1))
        for i, p in enumerate(prompts)
    ]
    scheduler = Scheduler(requests, max_slots=2)
    first, second = scheduler.admit()
    assert (first.slot, second.slot) == (0, 1)
    assert scheduler.admit() == []
    assert scheduler.finish(first) == (0, None)
    (third,) = scheduler.admit()
    assert (third.slot, third.request.completion_id) == (0, "2")
    assert scheduler.finish(second) == (1, None)  # request 3 still needs prompt (1,)
    assert scheduler.finish(third) == (0, (2,))
    (fourth,) = scheduler.admit()
    assert scheduler.finish(fourth).prompt_ids == (1,)
    assert scheduler.done


def test_requests_that_cannot_be_served_are_refused_before_anything_runs(policy: Policy) -> None:
    engine = Engine(policy, max_slots=1, max_new_tokens=8)
    good = Request(completion_id="a", prompt_ids=(5,), sampling=SamplingParams(max_new_tokens=8))

    def refuse(match: str, *requests: Request, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=match):
            engine.run([good, *requests])

    params = SamplingParams(max_new_tokens=8)
    refuse("completion_id a", good)
    refuse("empty prompt", Request(completion_id="b", prompt_ids=(), sampling=params))
    refuse("allows 8", Request(completion_id="b", prompt_ids=(5,), sampling=SamplingParams(max_new_tokens=9)))
    refuse("vocabulary of 256", Request(completion_id="b", prompt_ids=(256,), sampling=params))
    too_long = Request(completion_id="b", prompt_ids=(5,) * 131070, sampling=params)
    refuse("context is 131072", too_long, kind=UserError)
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"min_p": 1.5}, {"top_k": -1}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SamplingParams(**({"max_new_tokens": 1} | bad))
