"""Sampling's Triton kernels, run by the interpreter where there is no card, against float64 and the CPU's sampler."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.engine.sampler import Sampler
from stages.engine.sampler import uniforms as uniforms_of
from stages.engine.sequence import SamplingParams
from stages.kernels.sampling import (
    CHUNK,
    FULL,
    RUNNING,
    STALE,
    STOPPED,
    SamplingState,
    make_state,
    sample,
    sample_plain,
    sample_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = {"plain": sample_plain, "triton": sample_triton}


def running_state(slots: int, *, new: int = 8, **values: object) -> SamplingState:
    """`slots` slots that sample at temperature 1, with some of their values given."""
    state = make_state(max_slots=slots, max_new_tokens=new, device=DEVICE)
    state.finished[:slots] = RUNNING
    state.limits[:slots] = new
    for name, value in values.items():
        getattr(state, name)[:slots] = torch.as_tensor(value, device=DEVICE)
    return state


def draw(path: str, logits: Tensor, state: SamplingState, rows: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities of the rows (all slots by default)."""
    slots = torch.tensor(range(state.dummy) if rows is None else rows, dtype=torch.int32, device=DEVICE)
    PATHS[path](logits.to(DEVICE), rows=slots, state=state, sources=None, scaled=False)
    results = state.results[: len(slots)].cpu()
    return results[:, 0].long(), results[:, 1].contiguous().view(torch.float32)


def shares_of(logits: Tensor, temperature: float) -> np.ndarray:
    return (logits.double().cpu() / temperature).softmax(-1).numpy()


@pytest.mark.parametrize("path", PATHS)
def test_stratified_uniforms_meet_each_token_as_often_as_its_probability_says(path: str) -> None:
    num = 32  # numbers (i + 1/2) / 32: a token of probability p gets 32 p of them, rounded up or down
    logits = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0]).log()
    state = running_state(num)
    state.uniforms[:num, 0] = (torch.arange(num, device=DEVICE) + 0.5) / num
    tokens, logprobs = draw(path, logits.expand(num, -1).contiguous(), state)
    assert np.bincount(tokens.numpy(), minlength=5).tolist() == [16, 8, 4, 2, 2]
    np.testing.assert_allclose(logprobs, np.log(np.array([8, 4, 2, 1, 1]) / 16)[tokens], atol=1e-6)


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "temperature"),
    [
        (201_088, torch.bfloat16, 1.0),
        (CHUNK + 1, torch.float16, 0.6),
        (3 * CHUNK, torch.float32, 1.7),
        (7, torch.float32, 1),
    ],
)
def test_the_token_is_the_first_whose_cumulative_probability_exceeds_the_number(
    vocabulary: int, dtype: torch.dtype, temperature: float
) -> None:
    rows = 3
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(rows, vocabulary, generator=generator) * 3).to(dtype)
    state = running_state(rows, temperatures=temperature)
    state.uniforms[:rows, 0] = torch.tensor([0.0137, 0.5231, 0.9991], device=DEVICE)
    tokens, logprobs = draw("triton", logits, state)
    shares = shares_of(logits.float(), temperature)
    cumulative = shares.cumsum(-1)
    for row, token in enumerate(tokens.tolist()):
        number = float(state.uniforms[row, 0])
        assert cumulative[row, token] - shares[row, token] - 2e-6 <= number <= cumulative[row, token] + 2e-6
        assert abs(float(logprobs[row]) - np.log(shares[row, token])) < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_numbers_at_the_very_edges_choose_tokens_that_have_probability(path: str) -> None:
    vocabulary = CHUNK + 100
    logits = torch.full((3, vocabulary), -torch.inf)
    logits[:, [5, 700, CHUNK + 3]] = torch.tensor([0.0, 1.0, -1.0])
    state = running_state(3)
    state.uniforms[:3, 0] = torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=torch.float64, device=DEVICE)
    tokens, logprobs = draw(path, logits, state)
    assert tokens.tolist() == [5, CHUNK + 3, 700]
    assert torch.isfinite(logprobs).all()


@pytest.mark.parametrize("path", PATHS)
def test_greedy_takes_the_lowest_index_of_the_largest_logit_and_reports_temperature_one(path: str) -> None:
    vocabulary = 2 * CHUNK + 9
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[0, [CHUNK + 7, CHUNK + 8, 2 * CHUNK]] = 9.0  # a tie within a chunk, and across two
    logits[1, [3, CHUNK - 1, 2 * CHUNK + 8]] = 9.0
    logits[2, -1] = 9.0
    state = running_state(3, temperatures=0.0)
    state.uniforms[:3] = 0.9
    tokens, logprobs = draw(path, logits, state)
    assert tokens.tolist() == [CHUNK + 7, 3, vocabulary - 1]
    np.testing.assert_allclose(logprobs, np.log(shares_of(logits, 1.0))[[0, 1, 2], tokens], atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_a_slot_moves_on_until_a_stop_token_or_its_limit_and_then_stands_still(path: str) -> None:
    logits = torch.zeros(5, 40)
    logits[torch.arange(5), torch.tensor([11, 12, 13, 14, 15])] = 50.0
    state = running_state(5, positions=[7, 8, 9, 10, 11], limits=[1, 2, 8, 8, 8])
    state.uniforms[:5] = 0.5
    state.stop_ids[2, 7] = 13
    before = state.tokens.clone()
    draw(path, logits, state, [0, 1, 2, 5, 5])  # slots 3 and 4 have no row, the dummy has two
    assert state.results[:5, 2].tolist() == [FULL, RUNNING, STOPPED, STALE, STALE]
    assert state.finished.tolist() == [FULL, RUNNING, STOPPED, RUNNING, RUNNING, FULL]
    assert state.positions.tolist() == [8, 9, 10, 10, 11, 0]
    assert state.steps.tolist() == [1, 1, 1, 0, 0, 0]
    assert state.tokens[:3].tolist() == [11, 12, 13]
    assert state.tokens[3:].equal(before[3:])
    assert state.results[:3, 3].tolist() == [0, 0, 0]
    draw(path, logits.roll(1, dims=1), state, [2, 1, 0, 3, 5])
    assert state.results[:5, 2].tolist() == [STALE, FULL, STALE, RUNNING, STALE]
    assert state.positions.tolist() == [8, 10, 10, 11, 11, 0]
    assert state.tokens[:4].tolist() == [11, 13, 13, 15]
    np.testing.assert_allclose(state.logprobs[:4].cpu(), 0, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_each_step_takes_the_next_number_and_each_row_the_logits_it_names(path: str) -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf], [-torch.inf, -torch.inf, 0.0, 0.0]])
    state = running_state(3, new=2)
    state.uniforms[:3] = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.1, 0.1]], device=DEVICE)
    rows = torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE)
    sources = torch.tensor([1, 0, 0], dtype=torch.int32, device=DEVICE)
    sampled = []
    for _ in range(2):
        PATHS[path](logits.to(DEVICE), rows=rows, state=state, sources=sources, scaled=False)
        sampled.append(state.results[:3, 0].tolist())
    assert sampled == [[2, 0, 1], [2, 1, 0]]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_logits_give_a_nan_logprob_and_a_token_of_the_vocabulary() -> None:
    for path in PATHS:
        logits = torch.zeros(2, 30)
        logits[0, 4], logits[1, 4] = torch.nan, torch.inf
        tokens, logprobs = draw(path, logits, running_state(2))
        assert torch.isnan(logprobs).all()
        assert ((tokens >= 0) & (tokens < 30)).all()


def test_filters_cut_what_the_cpu_sampler_cuts() -> None:
    filters = [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"temperature": 0.0, "top_k": 2}, {"temperature": 0.5}, {}]
    filters.append({"top_k": 9, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3})
    params = [SamplingParams(max_new_tokens=4, seed=seed, **cut) for seed, cut in enumerate(filters)]
    num = len(params)
    logits = torch.randn(num, 300, generator=torch.Generator().manual_seed(2)) * 2
    sampler = Sampler(max_slots=num, max_new_tokens=4, device=torch.device("cpu"))
    state = running_state(num, new=4)
    for slot, param in enumerate(params):
        sampler.assign(slot, param)
        greedy = param.temperature == 0
        state.temperatures[slot], state.top_k[slot] = param.temperature, 0 if greedy else param.top_k
        state.top_p[slot], state.min_p[slot] = param.top_p, param.min_p
        state.uniforms[slot] = torch.from_numpy(uniforms_of(param.seed, 4))
    rows = torch.arange(num, dtype=torch.int32, device=DEVICE)
    for step in range(3):
        tokens, logprobs = sampler.sample(logits, torch.full((num,), step))
        sample(logits.to(DEVICE), rows=rows, state=state, filtered=True)
        assert state.tokens[:num].tolist() == tokens.tolist()
        np.testing.assert_allclose(state.logprobs[:num].cpu(), logprobs, atol=1e-5)


def test_rows_that_do_not_fit_are_refused() -> None:
    state = running_state(2)
    rows = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="3 rows, logits \\(3, 10\\), room for 2"):
        sample(torch.zeros(3, 10, device=DEVICE), rows=rows, state=state)
    with pytest.raises(ValueError, match="do not fit"):
        sample(torch.zeros(1, 10, device=DEVICE), rows=rows[:2], state=state)


@pytest.mark.gpu
def test_a_hundred_thousand_draws_on_the_card_follow_the_distribution() -> None:
    """Chi-square over the 200 likeliest tokens and the rest: its 99.999 % quantile at 200 degrees is 300."""
    vocabulary, rows, repeats = 201_088, 250, 400
    logits = torch.randn(1, vocabulary, device="cuda", generator=torch.Generator("cuda").manual_seed(3)) * 3
    state = running_state(rows, new=repeats)
    state.uniforms[:rows] = torch.rand(rows, repeats, dtype=torch.float64, device="cuda")
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    drawn = torch.zeros(vocabulary, device="cuda")
    for _ in range(repeats):
        sample(logits, rows=slots, sources=torch.zeros_like(slots), state=state)
        drawn += torch.bincount(state.results[:rows, 0], minlength=vocabulary)
    shares = logits[0].double().softmax(-1)
    likeliest = shares.topk(200).indices
    expected = torch.cat((shares[likeliest], 1 - shares[likeliest].sum()[None])) * rows * repeats
    observed = torch.cat((drawn[likeliest], (drawn.sum() - drawn[likeliest].sum())[None]))
    assert float(((observed - expected) ** 2 / expected).sum()) < 300


@pytest.mark.gpu
def test_kernels_and_plain_path_agree_on_the_card_at_full_size() -> None:
    logits = (torch.randn(256, 201_088, device="cuda") * 3).bfloat16()
    plain, triton = running_state(256), running_state(256)
    plain.uniforms[:256] = torch.rand(256, 8, dtype=torch.float64, device="cuda")
    triton.uniforms.copy_(plain.uniforms)
    tokens, logprobs = draw("plain", logits, plain)
    found, found_logprobs = draw("triton", logits, triton)
    same = tokens == found
    assert same.float().mean() > 0.99  # the others lie at boundaries, where the last bits of a sum decide
    np.testing.assert_allclose(found_logprobs[same], logprobs[same], atol=2e-5)
    for field in dataclasses.fields(plain):
        if field.name in ("positions", "steps", "finished"):
            assert torch.equal(getattr(plain, field.name), getattr(triton, field.name))
