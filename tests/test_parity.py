"""The trainer against transformers eager, against itself otherwise packed, and against the engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from stages.engine import Engine, Request, SamplingParams
from stages.grpo import kl_to_reference
from stages.model.lora import ATTENTION_TARGETS
from stages.model.nf4 import dense_weight
from stages.model.policy import Policy
from stages.tasks import registry
from stages.trainer import Pack, Sample, completion_logprobs, deal_packs
from stages.trainer.plan import PLANS
from tests.test_engine import BUNDLED, make_policy, merged_eager, prompt_of

LENGTHS = ((130, (3, 140, 1)), (4, (20, 160)), (2, (9,)))  # prompts past the window, and completions of one token


@pytest.fixture(scope="module")
def policy(random_checkpoint: Path) -> Policy:
    return make_policy(random_checkpoint)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    found = []
    for prompt_length, completions in LENGTHS:
        for length in completions:
            name = f"{prompt_length}-{length}"
            found.append(Sample(name, prompt_of(prompt_length), prompt_of(length, seed=7), (0.0,) * length, 0.0))
    return found


def with_grads(policy: Policy, packs: list[Pack], **options: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Log-probabilities by completion, and the adapter's gradient of a fixed weighting of them."""
    parameters = policy.parameters()
    for _, parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = None
    found = {}
    for pack in packs:
        out = completion_logprobs(policy, pack, temperature=0.9, **options)  # type: ignore[arg-type]
        loss = torch.zeros((), device=policy.device)
        for sample, logprobs in zip(pack.samples, out.logprobs.split(pack.lengths), strict=True):
            found[sample.completion_id] = logprobs.detach()
            loss = loss + (logprobs * weights_of(sample).to(logprobs.device)).sum()
        loss.backward()
    grads = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
    for _, parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    return found, grads


def weights_of(sample: Sample) -> Tensor:
    generator = torch.Generator().manual_seed(len(sample.prompt_ids) + len(sample.completion_ids))
    return torch.randn(len(sample.completion_ids), generator=generator)


def assert_same(found: tuple[dict[str, Tensor], ...], expected: tuple[dict[str, Tensor], ...], *, atol: float) -> None:
    """Log-probabilities and gradients; the latter relative to the largest of a parameter."""
    for name, logprobs in expected[0].items():
        torch.testing.assert_close(found[0][name], logprobs.to(found[0][name].dtype), atol=atol, rtol=0)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).abs().max() <= 3 * atol * grad.abs().max(), name


def test_logprobs_and_gradients_equal_transformers_eager(
    policy: Policy, samples: list[Sample], random_checkpoint: Path
) -> None:
    eager = merged_eager(policy, random_checkpoint).double()
    eager.requires_grad_(True)
    expected = {}
    loss = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        new = len(sample.completion_ids)
        logprobs = (eager(ids, use_cache=False).logits[0, -new - 1 : -1] / 0.9).log_softmax(-1)
        chosen = logprobs.gather(-1, ids[0, -new:, None]).squeeze(-1)
        expected[sample.completion_id] = chosen.detach()
        loss = loss + (chosen * weights_of(sample)).sum()
    loss.backward()
    # W + scale B A has the gradients scale dW A^T for B and scale B^T dW for A.
    grads = {}
    layers = zip(policy.model.model.layers, eager.model.layers, strict=True)
    for index, (ours, theirs) in enumerate(layers):
        prefix = f"model.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer, weight = getattr(ours.self_attn, name), getattr(theirs.self_attn, name).weight
            grads[f"{prefix}.self_attn.{name}.a"] = layer.scale * layer.b.double().T @ weight.grad
            grads[f"{prefix}.self_attn.{name}.b"] = layer.scale * weight.grad @ layer.a.double().T
        for name in ("gate_up", "down"):
            factors = getattr(ours.mlp.experts, f"{name}_lora").factors()
            of_weight = getattr(theirs.mlp.experts, f"{name}_proj").grad.mT  # [E, out, in]
            grads[f"{prefix}.mlp.experts.{name}_lora.a"] = factors.scale * factors.b.double().mT @ of_weight
            grads[f"{prefix}.mlp.experts.{name}_lora.b"] = factors.scale * of_weight @ factors.a.double().mT
    assert_same(with_grads(policy, deal_packs(samples, 10_000)), (expected, grads), atol=1e-4)


def test_packed_equals_unpacked_and_a_shared_prompt_equals_its_copies(policy: Policy, samples: list[Sample]) -> None:
    alone = with_grads(policy, [Pack((sample,)) for sample in samples])
    for pack_tokens in (10_000, 300):
        packs = deal_packs(samples, pack_tokens)
        assert len(packs) == (1 if pack_tokens == 10_000 else 2)
        found = with_grads(policy, packs)
        assert_same(found, alone, atol=1e-5)
        for name, grad in alone[1].items():
            cosine = torch.cosine_similarity(found[1][name].flatten().double(), grad.flatten().double(), dim=0)
            assert cosine > 0.999999, name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_in_bfloat16_packed_is_unpacked_but_for_rounding(device: str) -> None:
    """Of what the model samples itself: tokens that it finds absurd differ by more where sums have another order."""
    _, samples = sampled(max_new_tokens=90)
    experts = "mxfp4" if device == "cuda" else "dequantized"
    policy = make_policy(BUNDLED, experts=experts, dtype=torch.bfloat16, device=device)
    alone = with_grads(policy, [Pack((sample,)) for sample in samples])
    for kept in ((0, 0), (2, 2), (4, 1)):  # of 4, the others are computed again from their rounded input
        plan = PLANS[0]._replace(kept_attention=kept[0], kept_experts=kept[1])
        packed = with_grads(policy, deal_packs(samples, 10_000), recompute=True, plan=plan)
        for name, logprobs in alone[0].items():
            torch.testing.assert_close(packed[0][name], logprobs, atol=0.04, rtol=0)
        for name, grad in alone[1].items():
            cosine = torch.cosine_similarity(packed[1][name].flatten().double(), grad.flatten().double(), dim=0)
            assert cosine > 0.999, (kept, name, float(cosine))


def test_layers_computed_again_in_backward_give_the_bits_of_those_kept(policy: Policy, samples: list[Sample]) -> None:
    packs = deal_packs(samples, 10_000)
    expected = with_grads(policy, packs)
    for kept in ((0, 0), (1, 1), (3, 1), (0, 4), (4, 4), (5, 5)):  # of 4
        plan = PLANS[0]._replace(kept_attention=kept[0], kept_experts=kept[1])
        found = with_grads(policy, packs, recompute=True, plan=plan)
        for name, grad in expected[1].items():
            assert torch.equal(found[1][name], grad), (kept, name)


def test_attention_and_unembedding_in_nf4_train_as_their_unpacked_weights_do(
    random_checkpoint: Path, samples: list[Sample]
) -> None:
    packed, plain = make_policy(random_checkpoint, dense="nf4"), make_policy(random_checkpoint)
    head: Any = packed.model.lm_head
    with torch.no_grad():
        for ours, theirs in zip(packed.model.model.layers, plain.model.model.layers, strict=True):
            for name in ATTENTION_TARGETS:
                unpacked = dense_weight(getattr(ours.self_attn, name).base_layer)
                getattr(theirs.self_attn, name).base_layer.weight.copy_(unpacked)
        plain.model.lm_head.weight.copy_(head[0 : head.shape[0]])
    packs = deal_packs(samples, 10_000)
    assert_same(with_grads(packed, packs, recompute=True), with_grads(plain, packs), atol=1e-5)


def test_packs_hold_every_sample_once_within_their_limit(samples: list[Sample]) -> None:
    for limit in (1, 150, 300, 10_000):
        packs = deal_packs(samples, limit)
        names = [sample.completion_id for pack in packs for sample in pack.samples]
        assert sorted(names) == sorted(sample.completion_id for sample in samples)
        for pack in packs:
            assert pack.num_tokens <= limit or len(pack.samples) == 1
            assert pack.num_tokens == len(pack.tensors(torch.device("cpu")).ids)


def test_replayed_routes_are_used_and_the_own_ones_change_nothing(policy: Policy, samples: list[Sample]) -> None:
    pack = deal_packs(samples[:2], 10_000)[0]
    routes: list[Tensor] = []
    with torch.no_grad():
        free = completion_logprobs(policy, pack, temperature=1.0, routes=routes).logprobs
    own = torch.stack(routes, dim=1).to(torch.uint8)  # [T, layers, k]
    prompt = len(samples[0].prompt_ids)
    first, second = own[: prompt + samples[0].num_tokens], own[prompt + samples[0].num_tokens :]

    def replayed(shift: int) -> Tensor:
        recorded = [(first + shift) % 8, (torch.cat((own[:prompt], second)) + shift) % 8]
        pairs = zip(pack.samples, recorded, strict=True)
        given = Pack(tuple(sample._replace(routes=each) for sample, each in pairs))
        with torch.no_grad():
            return completion_logprobs(policy, given, temperature=1.0, replay_routes=True).logprobs

    torch.testing.assert_close(replayed(0), free, atol=1e-6, rtol=0)
    assert (replayed(1) - free).abs().max() > 0.01
    with pytest.raises(ValueError, match="no recorded routes"):
        completion_logprobs(policy, pack, temperature=1.0, replay_routes=True)


def sampled(*, max_new_tokens: int) -> tuple[Policy, list[Sample]]:
    """The bundled policy on the CPU in float32, with an adapter that matters, and what it says to two prompts."""
    policy = make_policy(BUNDLED, trained=False)
    policy.tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.parameters():
            if name.endswith(".b"):
                parameter.normal_(0, 0.02, generator=generator)
    prompts = registry.get("game2048", {}).prompts(2, 0, 0)
    requests = [
        Request(
            completion_id=str(number),
            prompt_ids=policy.render(prompts[number // 4].messages),
            sampling=SamplingParams(max_new_tokens=max_new_tokens, seed=number, stop_token_ids=policy.stop_token_ids),
        )
        for number in range(8)
    ]
    completions = Engine(policy, max_slots=8, max_new_tokens=max_new_tokens).run(requests)
    samples = [
        Sample(c.completion_id, tuple(c.prompt_ids), tuple(c.completion_ids), tuple(c.engine_logprobs), 0.0)
        for c in completions
    ]
    return policy, samples


def test_the_engine_says_what_the_trainer_says_of_the_bundled_model() -> None:
    policy, samples = sampled(max_new_tokens=60)
    for pack in deal_packs(samples, 4096):
        with torch.no_grad():
            ours = completion_logprobs(policy, pack, temperature=1.0).logprobs
        engine = torch.tensor([x for sample in pack.samples for x in sample.engine_logprobs])
        assert (ours - engine).abs().max() < 1e-4
        assert kl_to_reference(engine, ours).mean() < 1e-8
        assert (ours - engine).abs().mean() < 1e-5
