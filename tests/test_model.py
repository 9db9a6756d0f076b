"""Checkpoints, LoRA files and the trainer's forward, against transformers and PEFT."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.config import UserError
from stages.engine import Engine, Request, SamplingParams
from stages.model import lora
from stages.model.checkpoint import Checkpoint, expected_shapes, locate
from stages.model.gpt_oss import build
from stages.trainer import Pack, Sample, completion_logprobs, deal_packs
from tests import network_watch
from tests.random_gpt_oss import eager_model, make_config
from tests.test_engine import make_policy, merged_eager, prompt_of

ROOT = Path(__file__).parent.parent


LOCATE = """
import time
from stages.model.checkpoint import locate
import huggingface_hub
started = time.monotonic()
print(locate("somebody/gpt-oss-tiny"))
print(time.monotonic() - started < 1)
"""


def located(folder: Path) -> tuple[list[str], str]:
    """What `locate` finds of a hub id, with the hub's cache in that folder; and whom it asked."""
    (folder / "sitecustomize.py").write_text(network_watch.PROGRAM)
    environment = {"PYTHONPATH": f"{folder}:{ROOT}", "NETWORK_WATCH": str(folder / "log"), "HF_HOME": str(folder)}
    environment |= {"HF_ENDPOINT": "http://127.0.0.2:9", "PATH": os.environ["PATH"], "HOME": str(folder)}
    done = subprocess.run([sys.executable, "-c", LOCATE], env=environment, capture_output=True, text=True, cwd=folder)
    log = folder / "log"
    return done.stdout.splitlines() or done.stderr.splitlines()[-1:], log.read_text() if log.exists() else ""


@pytest.mark.timed
def test_a_whole_checkpoint_in_the_hubs_cache_is_used_without_asking_the_hub(
    tmp_path: Path, random_checkpoint: Path
) -> None:
    cache = tmp_path / "hub/models--somebody--gpt-oss-tiny"
    snapshot = cache / "snapshots/0123456789012345678901234567890123456789"
    shutil.copytree(random_checkpoint, snapshot)
    shutil.copy(ROOT / "data/tiny/tokenizer.json", snapshot)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(snapshot.name)
    assert located(tmp_path) == ([str(snapshot), "True"], "")
    weights = next(path for path in sorted(snapshot.iterdir()) if path.suffix == ".safetensors")
    weights.unlink()  # a download that was broken off
    assert "socket.connect 127.0.0.2" in located(tmp_path)[1]  # HF_ENDPOINT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_no_published_model_is_fetched() -> None:
    with pytest.raises(UserError, match="openai/gpt-oss-20b needs a GPU of 16 GB or more") as caught:
        locate("openai/gpt-oss-20b")
    assert "tiny" in caught.value.hint


def test_the_network_watch_would_notice(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(network_watch.PROGRAM)
    program = "import socket; socket.socket().connect_ex(('192.0.2.1', 0)); socket.getaddrinfo('127.0.0.1', 80)"
    environment = {"PYTHONPATH": str(tmp_path), "NETWORK_WATCH": str(tmp_path / "log")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert (tmp_path / "log").read_text() == "socket.connect 192.0.2.1 in ['-c']\n"


def test_logits_equal_transformers_eager_past_every_window_and_yarn_edge(random_checkpoint: Path) -> None:
    ours = build(Checkpoint(random_checkpoint), experts="mxfp4", dtype=torch.float32)
    theirs = eager_model(random_checkpoint)
    for length in (1, 129, 600, 4200):
        ids = torch.tensor([prompt_of(length)])
        with torch.no_grad():
            right = theirs(ids, use_cache=False).logits.log_softmax(-1)
            mine = ours(ids, use_cache=False).logits.log_softmax(-1)
        assert (mine - right).abs().max() < 1e-4, length


def test_left_padding_is_masked(random_checkpoint: Path) -> None:
    model = build(Checkpoint(random_checkpoint), experts="dequantized", dtype=torch.float32)
    ids = torch.tensor([prompt_of(40)])
    padded = torch.cat((torch.full((1, 13), 7), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 13), torch.ones(1, 40)), dim=1).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(ids, use_cache=False).logits
        among = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 13:]
    torch.testing.assert_close(among, alone, atol=1e-4, rtol=1e-4)


def test_engine_trainer_and_eager_agree_on_every_logprob(random_checkpoint: Path) -> None:
    policy = make_policy(random_checkpoint)
    eager = merged_eager(policy, random_checkpoint)
    engine = Engine(policy, max_slots=8, max_new_tokens=150)
    requests = [
        Request(
            completion_id=str(index),
            prompt_ids=prompt_of((5, 130, 60)[index % 3]),
            sampling=SamplingParams(max_new_tokens=40 + 13 * index, seed=index),
        )
        for index in range(8)
    ]
    completions = engine.run(requests)
    samples = [Sample(c.completion_id, c.prompt_ids, c.completion_ids, c.engine_logprobs, 0.0) for c in completions]
    (pack,) = deal_packs(samples, 10_000)
    with torch.no_grad():
        trainer = completion_logprobs(policy, pack, temperature=1.0).logprobs.split(pack.lengths)
        for ours, sample in zip(trainer, pack.samples, strict=True):
            ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
            logprobs = eager(ids, use_cache=False).logits[0].log_softmax(-1)
            places = torch.arange(len(sample.prompt_ids) - 1, ids.shape[1] - 1)
            right = logprobs[places, torch.tensor(sample.completion_ids)]
            assert (ours - right).abs().max() < 1e-4
            assert (torch.tensor(sample.engine_logprobs) - right).abs().max() < 1e-4


def test_peft_loads_our_adapter_and_gives_our_logits(random_checkpoint: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    policy = make_policy(random_checkpoint)
    policy.save_adapter(tmp_path)
    theirs = PeftModel.from_pretrained(eager_model(random_checkpoint), tmp_path).eval()
    ids = torch.tensor([prompt_of(150)])
    with torch.no_grad():
        right = theirs(ids, use_cache=False).logits.log_softmax(-1)
        mine = policy.model(ids, use_cache=False).logits.log_softmax(-1)
        base = eager_model(random_checkpoint)(ids, use_cache=False).logits.log_softmax(-1)
    assert (mine - right).abs().max() < 1e-4
    assert (mine - base).abs().max() > 0.1  # the adapter matters, so agreeing means something


def test_an_adapter_survives_a_round_trip_bit_for_bit(random_checkpoint: Path, tmp_path: Path) -> None:
    policy, other = make_policy(random_checkpoint), make_policy(random_checkpoint, trained=False)
    policy.save_adapter(tmp_path)
    other.load_adapter(tmp_path, version=3)
    assert other.version == 3
    for (name, mine), (_, theirs) in zip(policy.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    other.reset_adapter()
    untrained = make_policy(random_checkpoint, trained=False)
    for (name, mine), (_, theirs) in zip(untrained.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_adapters_that_do_not_fit_are_named(random_checkpoint: Path, tmp_path: Path) -> None:
    policy = make_policy(random_checkpoint)
    policy.save_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = lora.peft_name("model.layers.0.mlp.experts.down_lora.a")
    save_file(tensors | {key: tensors[key][:4].contiguous()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"is \(4, 128\), the model needs \(32, 128\)"):
        policy.load_adapter(tmp_path, version=1)
    tensors.pop(key)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="has no tensor"):
        policy.load_adapter(tmp_path, version=1)


def test_only_the_adapter_trains(random_checkpoint: Path) -> None:
    policy = make_policy(random_checkpoint)
    trainable = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in policy.parameters()}
    assert len(trainable) == 4 * (4 + 2) * 2  # layers x (attention + experts) x factors
    sample = Sample("a", tuple(prompt_of(9)), tuple(prompt_of(6)), (0.0,) * 6, 1.0)
    completion_logprobs(policy, Pack((sample,)), temperature=1.0).logprobs.sum().backward()
    for name, parameter in policy.parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.fixture
def broken(random_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(random_checkpoint, tmp_path / "broken")


def refuses(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        list(Checkpoint(folder).tensors())
    assert caught.value.hint


def test_a_truncated_file_is_named(broken: Path) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    refuses(broken, r"model\.safetensors cannot be read")


def test_a_wrong_architecture_is_named(broken: Path) -> None:
    (broken / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refuses(broken, "holds a llama model")


def test_a_missing_config_and_a_broken_one_are_named(broken: Path) -> None:
    (broken / "config.json").write_text("{")
    refuses(broken, "is not JSON")
    (broken / "config.json").unlink()
    refuses(broken, r"has no config\.json")


def test_missing_surplus_and_misshapen_tensors_are_named(broken: Path) -> None:
    path = broken / "model.safetensors"
    tensors = load_file(path)
    sinks = "model.layers.2.self_attn.sinks"
    save_file(tensors | {sinks: torch.zeros(9)}, path)
    refuses(broken, r"sinks in .* is \(9,\), config.json says \(8,\)")
    save_file(tensors | {"extra": torch.zeros(1)}, path)
    refuses(broken, "a tensor gpt-oss lacks: extra")
    save_file({name: tensor for name, tensor in tensors.items() if name != sinks}, path)
    refuses(broken, f"lacks tensor {sinks}")
    blocks = "model.layers.0.mlp.experts.down_proj_blocks"
    save_file(tensors | {blocks: tensors[blocks].float()}, path)
    refuses(broken, "has type F32")


def test_a_source_that_is_no_folder_is_refused_with_a_hint() -> None:
    with pytest.raises(UserError, match="no checkpoint folder"):
        locate("./does/not/exist")


def test_the_20b_shapes_are_the_published_ones() -> None:
    config = make_config(
        num_hidden_layers=24,
        hidden_size=2880,
        intermediate_size=2880,
        num_local_experts=32,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=201088,
    )
    shapes = expected_shapes(config, mxfp4=True)
    layer = "model.layers.23"
    assert shapes[f"{layer}.mlp.experts.gate_up_proj_blocks"] == (32, 5760, 90, 16)
    assert shapes[f"{layer}.mlp.experts.gate_up_proj_scales"] == (32, 5760, 90)
    assert shapes[f"{layer}.mlp.experts.down_proj_blocks"] == (32, 2880, 90, 16)
    assert shapes[f"{layer}.mlp.experts.gate_up_proj_bias"] == (32, 5760)
    assert shapes[f"{layer}.self_attn.q_proj.weight"] == (4096, 2880)
    assert shapes[f"{layer}.self_attn.k_proj.weight"] == (512, 2880)
    assert shapes[f"{layer}.self_attn.o_proj.weight"] == (2880, 4096)
    assert shapes["lm_head.weight"] == (201088, 2880)
    assert len(shapes) == 3 + 24 * 19
