"""The engine on a card, at gpt-oss's true widths with few layers, against transformers in float64 and against itself.

Run on one card: python -m pytest -m gpu tests/test_gpu_engine.py
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import GptOssForCausalLM

from stages.bench.decode import Rows
from stages.config import ModelConfig
from stages.engine import Engine, Request, SamplingParams
from stages.model.policy import Policy
from stages.model.shapes import SHAPES, Shape
from stages.model.synthetic import randomise_lora, synthetic_policy
from stages.tasks import registry
from tests.eager_twin import eager_twin

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
WIDE = SHAPES["gpt-oss-20b"].with_layers(4)
MANY = SHAPES["gpt-oss-120b"].with_layers(2)
WINDOW = 128


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def policy() -> Iterator[Policy]:
    """Four layers with LoRA on attention and experts."""
    yield synthetic_policy(WIDE, lora_rank=16, device=DEVICE, seed=1)
    torch.cuda.empty_cache()


def random_ids(*shape: int, seed: int = 0, vocabulary: int = WIDE.vocabulary) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


class Forced(NamedTuple):
    """What the engine made of tokens that were fed to it, one at a time."""

    logits: Tensor  # float32 [rows, fed + 1, V], of what follows the prompt and each token
    routes: Tensor  # int [rows, fed, layers, k]


@contextlib.contextmanager
def opened(policy: Policy, count: int, *, max_tokens: int, max_new_tokens: int) -> Iterator[Rows]:
    """Rows that note their routes; their memory is given back at the end."""
    rows = Rows(policy, count=count, max_tokens=max_tokens, max_new_tokens=max_new_tokens, note_routes=True)
    try:
        yield rows
    finally:
        rows.close()


def forced(rows: Rows, ids: Tensor, length: int) -> Forced:
    """Prefills the first `length` of ids [rows, T] and feeds the others by graph replay, all rows together."""
    logits, routes = [rows.prefill(ids[:, :length].tolist()).float().clone()], []
    for column in ids[:, length:].T:
        logits.append(rows.feed(column).float().clone())
        routes.append(rows.last_routes().clone())
    noted = torch.stack(routes).permute(2, 0, 1, 3) if routes else torch.empty(0)
    return Forced(torch.stack(logits, dim=1), noted)


def forced_alone(policy: Policy, ids: Tensor, length: int) -> Forced:
    """The same with rows of its own."""
    num_rows, total = ids.shape
    with opened(policy, num_rows, max_tokens=total, max_new_tokens=max(1, total - length)) as rows:
        return forced(rows, ids, length)


@torch.no_grad()
def logits_of(model: GptOssForCausalLM, ids: Tensor, last: int) -> Tensor:
    """float64 log-probabilities [rows, last, V] of transformers' model after the last so many of ids [rows, T]."""
    out = model(input_ids=ids.to(model.lm_head.weight.device), logits_to_keep=last, use_cache=False)
    return out.logits.double().log_softmax(-1)


def row_errors(logprobs: Tensor, oracle: Tensor) -> Tensor:
    """The root mean square over the vocabulary of the difference, for each token."""
    return (logprobs.double() - oracle).square().mean(-1).sqrt().flatten()


def assert_as_exact_as_plain(found: Tensor, plain: Tensor, oracle: Tensor) -> None:
    """The engine's error is at most twice that of the plain reference, for the middle token and on average.

    In either a rounding may tip a router that is close to a tie; those tokens are in both averages.
    """
    ours, theirs = row_errors(found.log_softmax(-1), oracle), row_errors(plain, oracle)
    print(
        f"error median {ours.median():.2e} (plain {theirs.median():.2e}), mean {ours.mean():.2e} ({theirs.mean():.2e})"
    )
    assert theirs.median() > 0
    assert ours.median() <= 2 * theirs.median()
    assert ours.mean() <= 2 * theirs.mean()


@pytest.mark.parametrize(
    ("shape", "rank", "exact"),
    [(WIDE, 0, torch.float64), (WIDE, 16, torch.float64), (MANY, 0, torch.float32)],
    ids=["20b", "20b with LoRA", "120b"],
)
def test_prefill_and_decode_are_as_exact_as_plain_bf16(shape: Shape, rank: int, exact: torch.dtype) -> None:
    policy = synthetic_policy(shape, lora_rank=rank, device=DEVICE, seed=2)
    ids = random_ids(6, 240, seed=3)
    engine = forced_alone(policy, ids, 200)
    plain = logits_of(policy.model, ids, 41) if rank else logits_of(eager_twin(policy, torch.bfloat16, seed=2), ids, 41)
    assert_as_exact_as_plain(engine.logits, plain, logits_of(eager_twin(policy, exact, seed=2), ids, 41))


@pytest.mark.parametrize("length", [127, 128, 129, 700, 4300])
def test_long_and_edge_lengths_are_as_exact_as_plain_bf16(policy: Policy, length: int) -> None:
    ids = random_ids(1, length + 24, seed=length)
    engine = forced_alone(policy, ids, length)
    oracle = logits_of(eager_twin(policy, torch.float32, seed=1), ids, 25)
    assert_as_exact_as_plain(engine.logits, logits_of(policy.model, ids, 25), oracle)


@torch.no_grad()
def test_a_window_layer_sees_128_tokens_itself_included_and_not_one_more() -> None:
    """One layer, the first, slides: nothing but the window can carry a token's influence."""
    policy = synthetic_policy(WIDE.with_layers(1), lora_rank=0, device=DEVICE)
    policy.model.model.layers[0].self_attn.v_proj.weight.mul_(20)  # one token of 128 is not lost among roundings
    for length in (127, 128, 129, 300):
        with opened(policy, 1, max_tokens=length + 3, max_new_tokens=3) as rows:
            for steps in (0, 1, 3):  # 0: the last row of the prefill
                position = length - 1 + steps
                ids = random_ids(1, length + steps, seed=length)
                plain = forced(rows, ids, length).logits[:, -1]
                for changed in (position - WINDOW, position - WINDOW + 1):
                    if changed < 0:
                        continue
                    other = ids.clone()
                    other[0, changed] = (other[0, changed] + 1) % WIDE.vocabulary
                    difference = (forced(rows, other, length).logits[:, -1] - plain).square().mean().sqrt().item()
                    seen = changed > position - WINDOW
                    print(f"length {length}, steps {steps}, {position - changed} back: {difference:.2e}")
                    assert difference > 0.008 if seen else difference < 0.004


def test_the_same_tokens_have_the_same_bits_in_batches_of_1_7_64_and_200(policy: Policy) -> None:
    ids = random_ids(200, 148, seed=5)
    found = {batch: batched_logprobs(policy, ids, 100, batch) for batch in (1, 7, 64, 200)}
    lone, lone_routes = found[1]
    for batch, (logprobs, routes) in found.items():
        difference = (logprobs - lone[: len(logprobs)]).abs()
        changed = (routes != lone_routes[: len(routes)]).any(-1).float().mean()
        print(f"batch {batch}: max {difference.max():.2e}, mean {difference.mean():.2e}; routes changed {changed:.2%}")
    for logprobs, routes in found.values():
        assert torch.equal(logprobs, lone[: len(logprobs)])
        assert torch.equal(routes, lone_routes[: len(routes)])


def batched_logprobs(policy: Policy, ids: Tensor, length: int, batch: int) -> tuple[Tensor, Tensor]:
    """Of ids [N, T] in full batches: log-probabilities float32 [n, fed - 1] of each token that follows a fed one, and
    that one's routes [n, fed - 1, layers, k].
    """
    logprobs, routes = [], []
    fed = ids.shape[1] - length
    with opened(policy, batch, max_tokens=ids.shape[1], max_new_tokens=fed) as rows:
        for at in range(0, len(ids) - batch + 1, batch):
            part = ids[at : at + batch]
            result = forced(rows, part[:, :-1], length)
            following = part[:, length + 1 :, None].to(result.logits.device)
            logprobs.append(result.logits[:, 1:].log_softmax(-1).gather(-1, following).squeeze(-1))
            routes.append(result.routes)
    return torch.cat(logprobs), torch.cat(routes)


def test_what_the_engine_says_of_its_tokens_is_what_the_trainer_says() -> None:
    """On the bundled model, which was trained: a random one's routers are so close to ties that either's roundings send
    every tenth token elsewhere.
    """
    policy = Policy.load(ModelConfig(source="data/tiny", dtype="bfloat16"), lora_rank=8, lora_alpha=16.0, seed=0)
    randomise_lora(policy, generator=torch.Generator(DEVICE).manual_seed(1))
    prompts = registry.get("game2048", {}).prompts(4, 0, 0)
    requests = [
        Request(
            completion_id=str(number),
            prompt_ids=policy.render(prompts[number // 16].messages),
            sampling=SamplingParams(max_new_tokens=300, seed=number, stop_token_ids=policy.stop_token_ids),
        )
        for number in range(64)
    ]
    completions = Engine(policy, max_slots=48, max_new_tokens=300).run(requests)
    differences = []
    for completion in completions:
        ids = torch.tensor([completion.prompt_ids + completion.completion_ids], device=DEVICE)
        new = len(completion.completion_ids)
        with torch.no_grad():
            logits = policy.model(input_ids=ids, logits_to_keep=new + 1, use_cache=False).logits[0, :-1]
        logprobs = logits.float().log_softmax(-1).gather(-1, ids[0, -new:, None]).squeeze(-1)
        differences.append(torch.tensor(completion.engine_logprobs, device=DEVICE) - logprobs)
    difference = torch.cat(differences)
    k3 = (torch.exp(-difference) - 1 + difference).mean()
    print(f"{difference.numel()} tokens: |difference| mean {difference.abs().mean():.2e}, k3 {k3:.2e}")
    assert difference.numel() > 5000
    assert k3 < 0.002


def test_greedy_decoding_says_the_same_twice(policy: Policy) -> None:
    requests = [
        Request(
            completion_id=str(number),
            prompt_ids=tuple(random_ids(50 + 17 * number, seed=number).tolist()),
            sampling=SamplingParams(max_new_tokens=30 + number, temperature=0.0),
        )
        for number in range(20)
    ]
    engine = Engine(policy, max_slots=16, max_new_tokens=64)
    first, again = engine.run(requests), engine.run(requests)
    other = Engine(policy, max_slots=16, max_new_tokens=64).run(requests)
    for one, two, three in zip(first, again, other, strict=True):
        assert one.completion_ids == two.completion_ids == three.completion_ids
        assert one.engine_logprobs == two.engine_logprobs == three.engine_logprobs


def test_fp16_runs_without_infinities() -> None:
    policy = synthetic_policy(WIDE, lora_rank=16, dtype=torch.float16, device=DEVICE, seed=4)
    ids = random_ids(5, 180, seed=6)
    engine = forced_alone(policy, ids, 150)
    assert torch.isfinite(engine.logits).all()
    plain = logits_of(policy.model, ids, 31)
    assert_as_exact_as_plain(engine.logits, plain, logits_of(eager_twin(policy, torch.float32, seed=4), ids, 31))


@torch.no_grad()
def test_a_changed_adapter_changes_what_a_captured_graph_says() -> None:
    policy = synthetic_policy(WIDE.with_layers(2), lora_rank=16, device=DEVICE, seed=7)
    rows = Rows(policy, count=3, max_tokens=300, max_new_tokens=4)
    rows.fill(200)
    token = torch.tensor([5, 6, 7])
    before = rows.feed(token).clone()
    for name, parameter in policy.parameters():
        if not name.endswith(".b"):
            continue
        kept = parameter.clone()
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
        rows.step.refresh()
        rows.rewind()
        changed = (rows.feed(token).float() - before.float()).abs().max()
        assert changed > 0, f"{name} is not what the graph reads"
        parameter.copy_(kept)
    rows.step.refresh()
    rows.rewind()
    assert torch.equal(rows.feed(token), before)
    rows.close()


def test_experts_stay_packed_and_there_is_one_copy_of_them() -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    policy = synthetic_policy(WIDE, lora_rank=0, device=DEVICE)
    weights = policy.weight_bytes()
    assert torch.cuda.max_memory_allocated() - before < weights + 1.3e9  # and one tensor: the embedding is 1.16 GB
    packed = packed_bytes(policy)
    values = WIDE.num_layers * WIDE.num_experts * 3 * WIDE.hidden * WIDE.expert_hidden
    assert packed == values * 17 // 32  # half a byte each, and a scale for 32
    torch.cuda.reset_peak_memory_stats()
    rows = Rows(policy, count=64, max_tokens=1100, max_new_tokens=32)
    rows.fill(1000)
    rows.run(32)
    torch.cuda.synchronize()
    held = torch.cuda.max_memory_allocated() + rows._memory.held_bytes
    beside = held - before - weights - rows.cache_bytes
    print(f"GB: weights {weights / 1e9:.2f}, of them experts {packed / 1e9:.2f}, beside them {beside / 1e9:.2f}")
    assert beside < packed / 2  # a second copy, or an unpacked layer (1.6 GB), would be more
    assert packed_bytes(policy) == packed
    rows.close()


def packed_bytes(policy: Policy) -> int:
    """Bytes of the experts' weights, none of which may be floating point: whatever else there is are biases."""
    tensors = [tensor for layer in policy.model.model.layers for tensor in layer.mlp.experts.state_dict().values()]
    assert all(tensor.dim() == 2 for tensor in tensors if tensor.is_floating_point())
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_floating_point())
