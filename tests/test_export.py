"""Exports against the tensors they must hold, and as transformers loads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from stages import export, memory
from stages.config import UpdateConfig, UserError
from stages.engine import Engine, Request, SamplingParams
from stages.model import excerpt as excerpts
from stages.model import lora, merge
from stages.model.checkpoint import Checkpoint
from stages.model.excerpt import excerpt
from stages.model.gpt_oss import build
from stages.model.mxfp4 import dequantize
from stages.model.policy import Policy
from stages.tasks import registry
from stages.trainer import Sample
from tests.test_engine import make_policy, prompt_of

PROMPT = registry.get("game2048").prompt()


@pytest.fixture(scope="module")
def base() -> Path:
    """The bundled model: in a random one routes are near ties, and 16-bit rounding alone changes its answers."""
    return Path(__file__).parents[1] / "data" / "tiny"


@pytest.fixture(scope="module")
def policy(base: Path) -> Policy:
    """Trained, but for experts 2 and 5 of layer 0, whose deltas are zero."""
    policy = make_policy(base)
    with torch.no_grad():
        for name in ("gate_up_lora", "down_lora"):
            getattr(policy.model.model.layers[0].mlp.experts, name).b[[2, 5]] = 0
        for name, parameter in policy.parameters():
            if name.endswith(".b"):
                parameter.mul_(0.4)
    return policy


@pytest.fixture(scope="module")
def probes(policy: Policy, base: Path) -> list[Sample]:
    policy.tokenizer = AutoTokenizer.from_pretrained(base)
    prompt_ids = policy.render([{"role": "user", "content": PROMPT}])
    requests = [
        Request(completion_id=str(i), prompt_ids=prompt_ids, sampling=SamplingParams(max_new_tokens=60, seed=i))
        for i in range(3)
    ]
    return [
        Sample(each.completion_id, each.prompt_ids, each.completion_ids, (), 0.0)
        for each in Engine(policy, max_slots=3, max_new_tokens=60).run(requests)
    ]


def distributions(model: Any, probes: list[Sample]) -> list[torch.Tensor]:
    return [logits.log_softmax(-1) for logits in export.logits_of(model, probes)]


@pytest.mark.parametrize("dense", ["full", "nf4"])
def test_the_distributions_of_a_policy_are_its_models(dense: str, base: Path, probes: list[Sample]) -> None:
    policy = make_policy(base, dense=dense)
    for ours, theirs in zip(export.distributions(policy, probes), distributions(policy.model, probes), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_mxfp4_keeps_the_bytes_of_untouched_experts_and_reports_the_error_of_the_others(
    policy: Policy, base: Path, probes: list[Sample], tmp_path: Path
) -> None:
    report = merge.write_merged(policy, Checkpoint(base), tmp_path, format="mxfp4")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for part in ("blocks", "scales"):
        name = f"model.layers.0.mlp.experts.down_proj_{part}"
        untouched = [bool((before[name][expert] == after[name][expert]).all()) for expert in range(8)]
        assert untouched == [False, False, True, False, False, True, False, False] or part == "scales"
        assert all(untouched[expert] for expert in (2, 5))
    assert [each.changed_experts for each in report] == [6, 6, 8, 8, 8, 8, 8, 8]
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    factors = policy.model.model.layers[1].mlp.experts.gate_up_lora.factors()
    delta = (torch.einsum("eor,eri->eoi", factors.b, factors.a) * factors.scale).detach()
    wanted = dequantize(before[f"{stack}_blocks"], before[f"{stack}_scales"], torch.float32) + delta
    stored = dequantize(after[f"{stack}_blocks"], after[f"{stack}_scales"], torch.float32)
    (said,) = (each for each in report if each.name == stack)
    assert said.delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert said.error_norm == pytest.approx(float((stored - wanted).norm()), rel=1e-5)
    assert said.error_norm < said.delta_norm  # these deltas are large: re-quantising keeps most of them
    figures = export.check_model(tmp_path, "mxfp4", probes)
    assert figures["float32"] < 1e-4


@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_dense_exports_hold_base_plus_delta_and_transformers_agrees(
    format: str, policy: Policy, base: Path, probes: list[Sample], tmp_path: Path
) -> None:
    merge.write_merged(policy, Checkpoint(base), tmp_path, format=format)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in raw
    merged = build(Checkpoint(tmp_path), experts="dequantized", dtype=torch.float32)
    live = export.distributions(policy, probes)
    theirs = distributions(merged, probes)
    untrained = export.distributions(make_policy(base, trained=False), probes)
    assert 0 <= export.kl(live, theirs) < 0.05 * export.kl(live, untrained)
    figures = export.check_model(tmp_path, format, probes)
    assert set(figures) == {"float32", {"bf16": "bfloat16", "fp16": "float16"}[format]}


@pytest.mark.parametrize("layers", [4, 2])
def test_peft_s_view_of_an_exported_adapter_is_ours_also_of_a_part(
    layers: int, policy: Policy, base: Path, probes: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, model = tmp_path / "adapter", base
    adapter.mkdir()
    policy.save_adapter(adapter)
    if layers == 2:
        adapter, model = excerpt(adapter, 2, tmp_path / "part"), excerpt(base, 2, tmp_path / "model")
    update = UpdateConfig(lora_rank=policy.lora_rank, lora_alpha=policy.lora_alpha)
    assert export.check_adapter(adapter, model, probes, update)["float32"] < 1e-4
    add_lora = lora.add_lora
    monkeypatch.setattr(lora, "add_lora", lambda *_, alpha, **rest: add_lora(*_, alpha=2 * alpha, **rest))
    with pytest.raises(UserError, match="differ from ours"):
        export.check_adapter(adapter, model, probes, update)


def test_an_excerpt_is_a_model_of_the_first_layers(base: Path, tmp_path: Path) -> None:
    whole, part = dict(Checkpoint(base).tensors()), Checkpoint(excerpt(base, 3, tmp_path / "part"))
    assert part.config.num_hidden_layers == len(part.config.layer_types) == 3
    for name, tensor in part.tensors():
        assert torch.equal(tensor, whole.pop(name)), name
    assert {name.split(".")[2] for name in whole} == {"3"}


def test_a_container_has_no_more_memory_than_it_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.available_bytes() > 100 << 20
    limit, used = tmp_path / "limit", tmp_path / "used"
    used.write_text("1000\n")
    monkeypatch.setattr(memory, "CGROUPS", ((tmp_path / "none", used), (limit, used)))
    for text, free in (("5000\n", 4000), ("500\n", 0)):
        limit.write_text(text)
        assert memory.available_bytes() == free
    limit.write_text("max\n")
    assert memory.available_bytes() > 100 << 20


def test_as_many_layers_are_checked_as_the_memory_holds(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Checkpoint(base).config
    rest = 2 * config.vocab_size * config.hidden_size
    monkeypatch.setattr(excerpts, "MEMORY_SHARE", 1.0)
    dense = sum(
        each.numel() for each in build(Checkpoint(base), experts="dequantized", dtype=torch.float32).parameters()
    )
    for free, layers in ((dense, 4), (dense - 1000, 3), (rest + 5 * (dense - rest) // 8, 2), (rest, 0), (0, 0)):
        monkeypatch.setattr(excerpts, "available_bytes", lambda free=free: 4 * free)
        assert excerpts.layers_in_memory(config, itemsize=4) == layers


def test_routes_that_are_near_ties_may_differ_in_16_bits(random_checkpoint: Path, tmp_path: Path) -> None:
    """A deep model's logits lie further apart there than any fixed bound, of equal tensors and equal code."""
    merge.write_merged(make_policy(random_checkpoint), Checkpoint(random_checkpoint), tmp_path, format="mxfp4")
    probes = [Sample("0", prompt_of(40), prompt_of(80)[40:], (), 0.0)]
    figures = export.check_model(tmp_path, "mxfp4", probes)
    assert figures["float32"] < 1e-4
    assert figures["bfloat16"] > export.TOLERANCE["bfloat16"]


def test_a_model_that_is_not_ours_is_refused(
    policy: Policy, base: Path, probes: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge.write_merged(policy, Checkpoint(base), tmp_path, format="bf16")
    monkeypatch.setattr(export, "build", lambda *_, dtype, **__: build(Checkpoint(base), experts="mxfp4", dtype=dtype))
    with pytest.raises(UserError, match="differ from ours"):
        export.check_model(tmp_path, "bf16", probes)


def test_shards_are_indexed_and_load_again(
    policy: Policy, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "SHARD_BYTES", 200_000)
    merge.write_merged(policy, Checkpoint(base), tmp_path, format="mxfp4")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    whole = tmp_path / "whole"
    whole.mkdir()
    monkeypatch.setattr(merge, "SHARD_BYTES", 1 << 30)
    merge.write_merged(policy, Checkpoint(base), whole, format="mxfp4")
    single = dict(Checkpoint(whole).tensors())
    for name, tensor in Checkpoint(tmp_path).tensors():
        assert torch.equal(tensor, single.pop(name)), name
    assert not single


def test_a_residual_adapter_brings_back_what_requantising_swallowed(base: Path, tmp_path: Path) -> None:
    policy = make_policy(base)
    with torch.no_grad():
        for name, parameter in policy.parameters():
            if name.endswith(".b"):
                parameter.mul_(0.1)  # far below the grid's step
    merge.write_merged(policy, Checkpoint(base), tmp_path, format="mxfp4")
    exported = make_policy(tmp_path, trained=False)
    probes = [Sample("a", prompt_of(30, seed), prompt_of(100, seed + 3), (), 0.0) for seed in range(6)]

    live = export.distributions(policy, probes)
    without = export.kl(live, export.distributions(exported, probes))
    merge.set_residual(merge.Changes.of(policy), exported, Checkpoint(base), Checkpoint(tmp_path))
    with_residual = export.kl(live, export.distributions(exported, probes))
    assert with_residual < 0.5 * without  # routers that flip at a near tie keep it from 0
    folder = tmp_path / "residual"
    folder.mkdir()
    exported.save_adapter(folder)
    again = make_policy(tmp_path, trained=False)
    again.load_adapter(folder, version=1)
    assert export.kl(live, export.distributions(again, probes)) == pytest.approx(with_residual, rel=1e-4)


def test_the_share_of_the_gain_is_none_where_there_is_none() -> None:
    assert export.kept(100.0, 300.0, 200.0) == pytest.approx(0.5)
    assert export.kept(100.0, 100.0, 200.0) is None


def test_tokenizer_files_travel_and_weights_do_not(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json", "model.safetensors"):
        (source / name).write_text(name)
    merge.copy_tokenizer(source, target)
    assert sorted(path.name for path in target.iterdir()) == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
    ]
