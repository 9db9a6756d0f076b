"""Sinks and routers that train beside the adapter: their values, gradients, files, and who reads them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flows.config import overridden
from flows.presets import preset
from stages import load, rollout, update
from stages.artifacts import RunDir, Session, StageId, execute
from stages.artifacts.parquet import METRICS, SAMPLES, read_table
from stages.bench.decode import Rows
from stages.config import UpdateConfig, UserError
from stages.engine import Engine, Request, SamplingParams
from stages.model import lora, merge
from stages.model.checkpoint import Checkpoint
from stages.model.full_weights import PARTS
from stages.model.gpt_oss import build
from stages.model.policy import Policy
from stages.model.shapes import SHAPES
from stages.model.synthetic import synthetic_policy
from stages.trainer import Pack, Sample, completion_logprobs, deal_packs
from stages.trainer.optimizer import make_optimizer, restore_optimizer, save_optimizer, unwaiting
from tests.eager_twin import eager_twin
from tests.random_gpt_oss import eager_model
from tests.test_engine import BUNDLED, merged_eager, prompt_of
from tests.test_parity import LENGTHS, assert_same, weights_of, with_grads
from tests.test_rollout_update import short_is_good

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WHICH = ("sinks", "router", "sinks+router")


def make_policy(
    folder: Path, which: str = "sinks+router", dtype: torch.dtype = torch.float32, *, device: str = "cpu"
) -> Policy:
    """As it is before training; `moved` trains it."""
    experts = "dequantized" if device == "cpu" else "mxfp4"
    model = build(Checkpoint(folder), experts=experts, dtype=dtype, device=device)
    sizes = {"lora_rank": 4, "lora_alpha": 8.0, "seed": 0, "source": str(folder), "checkpoint_digests": {}}
    return Policy(model, None, **sizes, also_train=which)  # type: ignore[arg-type]


@torch.no_grad()
def moved(policy: Policy, *, seed: int = 5, std: float = 0.3) -> Policy:
    """Everything that trains gets a change that matters, in place, as an optimizer's."""
    generator = torch.Generator(policy.device).manual_seed(seed)
    for name, parameter in policy.parameters():
        size = 0.05 if name.endswith(".b") else 0.0 if name.endswith(".a") else std * float(parameter.std())
        parameter.add_(torch.empty_like(parameter).normal_(0, 1, generator=generator), alpha=size)
    return policy


@torch.no_grad()
def with_full_weights(eager: nn.Module, policy: Policy) -> nn.Module:
    """transformers' model with the policy's sinks and routers, too."""
    for name, parameter in policy.full_weights.parameters():
        eager.get_parameter(name).copy_(parameter)
    return eager


def values(policy: Policy) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.parameters()}


@torch.no_grad()
def logits_of(model: nn.Module, ids: tuple[int, ...]) -> Tensor:
    found: Tensor = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    return found


@pytest.mark.parametrize("which", PARTS)
def test_before_training_nothing_is_other_than_without_them(which: str, random_checkpoint: Path) -> None:
    plain, policy = make_policy(random_checkpoint, "none"), make_policy(random_checkpoint, which)
    assert torch.equal(logits_of(plain.model, prompt_of(140)), logits_of(policy.model, prompt_of(140)))
    assert policy.weight_bytes() == plain.weight_bytes()
    adapter = [name for name, _ in plain.parameters()]
    names = [name for name, _ in policy.parameters()]
    assert names[: len(adapter)] == adapter
    wanted = {f"model.layers.{layer}.{part}" for layer in range(4) for part in PARTS[which]}
    assert set(names[len(adapter) :]) == wanted
    assert {name for name, p in policy.model.named_parameters() if p.requires_grad} == set(names)
    stored = load_file(random_checkpoint / "model.safetensors")
    for name, parameter in policy.full_weights.parameters():
        assert torch.equal(parameter, stored[name].float()), name


def test_steps_too_small_for_bfloat16_add_up(random_checkpoint: Path) -> None:
    policy = make_policy(random_checkpoint, dtype=torch.bfloat16)
    before = values(policy)
    with torch.no_grad():
        for _ in range(100):
            for _, parameter in policy.full_weights.parameters():
                parameter.add_(1e-5)
    assert (policy.dtype, policy.model.lm_head.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    for name, parameter in policy.full_weights.parameters():
        assert parameter.dtype == torch.float32
        assert float((parameter.detach() - before[name]).mean()) == pytest.approx(1e-3, rel=0.01), name
    assert policy.weight_bytes() == make_policy(random_checkpoint, "none", torch.bfloat16).weight_bytes()
    bare = logits_of(make_policy(random_checkpoint, "none", torch.bfloat16).model, prompt_of(20))
    assert torch.isfinite(logits_of(policy.model, prompt_of(20))).all()
    with policy.adapter_disabled():
        assert torch.equal(logits_of(policy.model, prompt_of(20)), bare)


def test_the_reference_and_a_reset_have_the_checkpoints_values_and_training_comes_back(
    random_checkpoint: Path,
) -> None:
    ids = prompt_of(60)
    policy = make_policy(random_checkpoint)
    base, untrained = logits_of(policy.model, ids), values(policy)
    addresses = [parameter.data_ptr() for _, parameter in policy.parameters()]
    trained = values(moved(policy))
    after = logits_of(policy.model, ids)
    assert (after - base).abs().max() > 0.1
    with policy.adapter_disabled():
        assert torch.equal(logits_of(policy.model, ids), base)
    with pytest.raises(ZeroDivisionError), policy.adapter_disabled():
        raise ZeroDivisionError
    assert torch.equal(logits_of(policy.model, ids), after)
    assert all(torch.equal(trained[name], parameter) for name, parameter in policy.parameters())
    policy.reset_adapter()
    assert all(torch.equal(untrained[name], parameter) for name, parameter in policy.parameters())
    assert torch.equal(logits_of(policy.model, ids), base)
    assert [parameter.data_ptr() for _, parameter in policy.parameters()] == addresses  # captured graphs hold them


def samples() -> list[Sample]:
    return [
        Sample(f"{first}-{length}", prompt_of(first), prompt_of(length, seed=7), (0.0,) * length, 0.0)
        for first, lengths in LENGTHS
        for length in lengths
    ]


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_sinks_and_routers_equal_transformers_eager_in_float64(
    random_checkpoint: Path, recompute: bool
) -> None:
    policy = moved(make_policy(random_checkpoint))
    eager = with_full_weights(merged_eager(policy, random_checkpoint), policy).double()
    names = [name for name, _ in policy.full_weights.parameters()]
    wanted = [eager.get_parameter(name).requires_grad_() for name in names]
    expected, loss = {}, torch.zeros((), dtype=torch.float64)
    for sample in samples():
        logits = eager(torch.tensor([sample.prompt_ids + sample.completion_ids]), use_cache=False).logits[0]
        chosen = torch.tensor(sample.completion_ids)[:, None]
        logprobs = (logits[-len(chosen) - 1 : -1] / 0.9).log_softmax(-1).gather(-1, chosen).squeeze(-1)
        expected[sample.completion_id] = logprobs.detach()
        loss = loss + (logprobs * weights_of(sample)).sum()
    grads = torch.autograd.grad(loss, wanted)
    found = with_grads(policy, deal_packs(samples(), 10_000), recompute=recompute)
    full = {name: found[1][name] for name in names}
    assert_same((found[0], full), (expected, dict(zip(names, grads, strict=True))), atol=1e-4)
    for name, grad in zip(names, grads, strict=True):
        assert grad.abs().max() > 1e-3, name


def test_engine_and_trainer_agree_after_sinks_and_routers_have_moved() -> None:
    policy = make_policy(BUNDLED)
    engine = Engine(policy, max_slots=6, max_new_tokens=40)
    requests = [
        Request(completion_id=str(i), prompt_ids=prompt_of((9, 140)[i % 2]), sampling=SamplingParams(max_new_tokens=40))
        for i in range(6)
    ]
    before = engine.run(requests)
    for seed in (1, 2):
        moved(policy, seed=seed)
        after = engine.run(requests)
        assert after != before
        before = after
        for completion in after:
            rows = completion.prompt_ids, completion.completion_ids, completion.engine_logprobs
            with torch.no_grad():
                ours = completion_logprobs(policy, Pack((Sample("", *rows, 0.0),)), temperature=1.0).logprobs
            assert (ours - torch.tensor(completion.engine_logprobs)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_engines_step_reads_what_was_moved_since_it_was_made(dtype: torch.dtype) -> None:
    """Its kernels, in Triton's interpreter where there is no card."""
    shape = dataclasses.replace(SHAPES["tiny"], num_layers=1, num_experts=4, vocabulary=300)
    policy = synthetic_policy(shape, lora_rank=4, dtype=dtype, device=DEVICE, seed=1, also_train="sinks+router")
    prompt = list(prompt_of(5))
    rows = Rows(policy, count=1, max_tokens=6, max_new_tokens=1)
    torch.manual_seed(0)
    stale = logits_of(policy.model, (*prompt, 7))[-1]
    with torch.no_grad():  # not the adapter, which refresh would copy
        for _, parameter in policy.full_weights.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=float(2 * parameter.std()))
    rows.prefill([prompt])
    found = rows.feed(torch.tensor([7]))[0].clone()
    rows.close()
    exact = with_full_weights(eager_twin(policy, torch.float64, seed=1), policy)
    wanted = logits_of(exact, (*prompt, 7))[-1]
    error, change = (found - wanted).abs().max(), (stale - wanted).abs().max()
    print(f"error {error:.2e}, change {change:.2e}")
    assert change > 0.2
    assert error < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.gpu
def test_captured_graphs_sample_from_what_was_moved_since(random_checkpoint: Path) -> None:
    policy = make_policy(random_checkpoint, dtype=torch.bfloat16, device=DEVICE)
    requests = [
        Request(completion_id=str(i), prompt_ids=prompt_of(130 + i), sampling=SamplingParams(max_new_tokens=30, seed=i))
        for i in range(8)
    ]
    engine = Engine(policy, max_slots=8, max_new_tokens=30)
    untrained = engine.run(requests)
    with torch.no_grad():
        for _, parameter in policy.full_weights.parameters():  # not the adapter, which is copied into the graphs
            parameter.mul_(0.5)
    after = engine.run(requests)
    assert engine.stats is not None
    assert engine.stats.capture_s == 0
    assert after != untrained
    assert after == Engine(policy, max_slots=8, max_new_tokens=30).run(requests)
    with policy.adapter_disabled():
        assert engine.run(requests) == untrained
    assert engine.run(requests) == after


@pytest.mark.parametrize("which", WHICH)
def test_their_file_is_read_back_bit_for_bit_and_by_peft(which: str, random_checkpoint: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    policy = moved(make_policy(random_checkpoint, which))
    policy.save_adapter(tmp_path)
    other = make_policy(random_checkpoint, which)
    other.load_adapter(tmp_path, version=3)
    for (name, mine), (_, theirs) in zip(policy.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    peft = PeftModel.from_pretrained(eager_model(random_checkpoint), tmp_path).eval()
    ids = prompt_of(150)
    right, mine = (logits_of(model, ids).log_softmax(-1) for model in (peft, policy.model))
    assert (right - mine).abs().max() < 1e-4
    if which == "router":  # as PEFT's modules_to_save, which it takes back
        with peft.disable_adapter():
            assert torch.equal(logits_of(peft, ids), logits_of(eager_model(random_checkpoint), ids))
    without = make_policy(random_checkpoint, "none")
    with pytest.raises(UserError, match="a tensor the model lacks") as caught:
        without.load_adapter(tmp_path, version=1)
    assert "update.also_train" in caught.value.hint
    with torch.no_grad():  # which did read the adapter: what is missing in it is the change of sinks and routers
        assert (logits_of(without.model, ids).log_softmax(-1) - mine).abs().max() > 1e-2


def test_without_them_the_files_say_nothing_of_them(random_checkpoint: Path, tmp_path: Path) -> None:
    make_policy(random_checkpoint, "none").save_adapter(tmp_path)
    assert "modules_to_save" not in json.loads((tmp_path / "adapter_config.json").read_text())
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert all("lora_" in name for name in names)
    with pytest.raises(UserError, match=r"no tensor .*self_attn\.sinks"):
        make_policy(random_checkpoint, "sinks").load_adapter(tmp_path, version=1)


@pytest.mark.parametrize("format", merge.FORMATS)
def test_merged_exports_hold_the_trained_values(format: str, random_checkpoint: Path, tmp_path: Path) -> None:
    policy = moved(make_policy(random_checkpoint))
    merge.write_merged(policy, Checkpoint(random_checkpoint), tmp_path, format=format)
    stored = load_file(tmp_path / "model.safetensors")
    for name, parameter in policy.full_weights.parameters():
        assert torch.equal(stored[name], parameter.to(merge.FORMATS[format])), name
    if format == "mxfp4":
        exported = make_policy(tmp_path)
        merge.set_residual(merge.Changes.of(policy), exported, Checkpoint(random_checkpoint), Checkpoint(tmp_path))
        mine, theirs = (dict(each.full_weights.parameters()) for each in (policy, exported))
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def train_once(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    for index, (_, parameter) in enumerate(policy.parameters()):
        generator = torch.Generator().manual_seed(index)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_weight_decay_draws_the_adapter_alone(random_checkpoint: Path) -> None:
    policy = moved(make_policy(random_checkpoint))
    config = UpdateConfig(learning_rate=0.5, weight_decay=1.0)
    before, optimizer = values(policy), make_optimizer(policy, config)
    for _, parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    full = {name for name, _ in policy.full_weights.parameters()}
    for name, parameter in policy.parameters():
        assert torch.equal(parameter, before[name] * (1.0 if name in full else 0.5)), name


def test_eight_bit_moments_of_small_tensors_stay_in_32_bits_and_are_restored(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def made(policy: Policy) -> torch.optim.Optimizer:
        found: torch.optim.Optimizer = bnb.optim.AdamW8bit([p for _, p in policy.parameters()], lr=1e-2)
        return found

    policy, other = make_policy(random_checkpoint), make_policy(random_checkpoint)
    optimizer, second = made(policy), made(other)
    train_once(policy, optimizer)
    kinds = {name: optimizer.state[parameter]["state1"].dtype for name, parameter in policy.parameters()}
    assert kinds["model.layers.0.self_attn.sinks"] == kinds["model.layers.3.mlp.router.bias"] == torch.float32
    assert kinds["model.layers.0.mlp.experts.down_lora.a"] == torch.uint8
    policy.save_adapter(tmp_path)
    save_optimizer(tmp_path, policy, optimizer, 1)
    other.load_adapter(tmp_path, version=1)
    assert restore_optimizer(tmp_path, other, second) == 1
    for each, its in ((policy, optimizer), (other, second)):
        train_once(each, its)
    for (name, mine), (_, theirs) in zip(policy.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


FUNCTIONS = {"load": load.run, "rollout": rollout.run, "score": short_is_good, "update": update.run}
STAGES = [StageId("load"), *(StageId(name, i) for i in (0, 1) for name in ("rollout", "score", "update"))]
WORDS = ["rollout.max_new_tokens=32", "train.iterations=2", "model.experts=dequantized", "update.kl=0.01"]


def run_stages(path: Path, which: str, *, one_process: bool, until: int = len(STAGES)) -> tuple[RunDir, list[str]]:
    """The run, and the content digests of its first `until` stages."""
    run = RunDir.create(path, overridden(preset("tiny_test"), [*WORDS, f"update.also_train={which}"]))
    digests, session = [], Session()
    for stage in STAGES[:until]:
        if not one_process:
            session.close()
            session = Session()
        digests.append(execute(run, run.config(), stage, FUNCTIONS[stage.name], session).digest)
    session.close()
    return run, digests


def test_updates_move_them_agree_with_the_engine_and_go_on_from_their_files(tmp_path: Path) -> None:
    run, digests = run_stages(tmp_path / "one", "sinks+router", one_process=True)
    assert run_stages(tmp_path / "several", "sinks+router", one_process=False)[1] == digests
    stored = load_file(BUNDLED / "model.safetensors")
    updates = [run.folder(StageId("update", i)) for i in (0, 1)]
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in updates]
    names = [f"model.layers.{layer}.{part}" for layer in range(4) for part in PARTS["sinks+router"]]
    for name in names:
        first, second = (each[lora.peft_name(name)] for each in tensors)
        base = stored[name].float()
        assert 0 < (first - base).abs().max() < 0.05, name
        assert not torch.equal(first, second), name
        assert f"{name}.exp_avg" in load_file(updates[1] / "optimizer.safetensors")
    rows = [row for folder in updates for row in read_table(folder, "metrics", METRICS).to_pylist()]
    assert [row["kl"] > 0 for row in rows] == [False, True, True, True]
    assert all(row["engine_kl"] < 1e-9 and row["engine_difference_max"] < 1e-4 for row in rows)
    # The reference of the second iteration is the checkpoint: what the untrained policy says of the same tokens.
    base_policy = make_policy(BUNDLED, "none")
    (sample, *_) = read_table(updates[1], "samples", SAMPLES).to_pylist()
    (row,) = (
        each
        for each in read_table(run.folder(StageId("rollout", 1)), "rollouts").to_pylist()
        if each["completion_id"] == sample["completion_id"]
    )
    alone = Sample("", tuple(row["prompt_ids"]), tuple(row["completion_ids"]), (), 0.0)
    with torch.no_grad():
        said = completion_logprobs(base_policy, Pack((alone,)), temperature=1.0).logprobs
    assert (said - torch.tensor(sample["reference_logprobs"])).abs().max() < 1e-5


@pytest.mark.parametrize("which", ["sinks", "router"])
def test_an_update_moves_what_it_is_told_to_and_nothing_else_of_the_model(which: str, tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", overridden(preset("tiny_test"), [*WORDS, f"update.also_train={which}"]))
    with Session() as session:
        for stage in STAGES[:3]:
            execute(run, run.config(), stage, FUNCTIONS[stage.name], session)
        policy: Policy = session.get("policy", lambda: pytest.fail("no policy"))
        tensors = [*policy.model.named_parameters(), *policy.model.named_buffers()]
        before = {name: tensor.detach().clone() for name, tensor in tensors}
        execute(run, run.config(), STAGES[3], update.run, session)
        changed = {name for name, tensor in tensors if not torch.equal(tensor, before[name])}
    assert changed == {name for name, _ in policy.parameters()}


def test_the_8_bit_optimizer_does_what_bitsandbytes_own_does() -> None:
    """Only that it does not wait for the card; on the CPU there is no card to wait for."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    shapes = [(32, 4, 64), (64,), (3000, 4)]  # the second has moments in 32 bits
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    optimizers = (
        unwaiting(bnb.optim.AdamW8bit)(ours, lr=1e-2, weight_decay=0.1),
        bnb.optim.AdamW8bit(theirs, lr=1e-2, weight_decay=0.1),
    )
    for step in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        if step == 1:
            ours[2].grad = theirs[2].grad = None
        for optimizer in optimizers:
            optimizer.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)
            assert not torch.equal(mine, torch.ones_like(mine))
