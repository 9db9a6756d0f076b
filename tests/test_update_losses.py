"""The update stage with every loss, on one rollout of the bundled model and rewards made up from its tokens."""

import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flows.config import overridden
from flows.presets import preset
from stages import load, rollout, update
from stages.artifacts import RunDir, Session, StageContext, StageId, execute
from stages.artifacts.parquet import METRICS, ROLLOUTS, SAMPLES, read_table, scores_schema, write_parts
from stages.config import UserError
from stages.grpo import LOSSES
from stages.model.policy import Policy, live_policy, open_policy
from stages.trainer import Pack, Sample, completion_logprobs

SETTINGS = ["rollout.max_new_tokens=48", "train.iterations=1"]
UPDATE = StageId("update", 0)


def only_the_second_group_differs(context: StageContext) -> None:
    """Rewards without a sandbox: in group 0 all alike, in group 1 the fewer kinds of tokens the better."""
    rows = read_table(context.input(StageId("rollout", context.stage.index)), "rollouts", ROLLOUTS).to_pylist()
    scored = [
        {
            "completion_id": row["completion_id"],
            "outcome": "ok",
            "reward": -len(set(row["completion_ids"])) * row["group_index"],
            "reward_x": 0.0,
        }
        for row in rows
    ]
    write_parts(context.out, "scores", scored, scores_schema(["reward_x"]))


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """One live policy for all: each update begins with its adapter reset."""
    with Session() as opened:
        yield opened


@pytest.fixture(scope="module")
def sampled(session: Session, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir.create(tmp_path_factory.mktemp("runs") / "sampled", overridden(preset("tiny_test"), SETTINGS))
    functions = {"load": load.run, "rollout": rollout.run, "score": only_the_second_group_differs}
    for stage in (StageId("load"), StageId("rollout", 0), StageId("score", 0)):
        execute(run, run.config(), stage, functions[stage.name], session)
    return run


def updated(sampled: RunDir, session: Session, path: Path, words: list[str]) -> RunDir:
    """A run of the same rollout and scores with settings of its own for the update, which is done."""
    run = RunDir.create(path, overridden(preset("tiny_test"), [*SETTINGS, *words]))
    for stage in (StageId("load"), StageId("rollout", 0), StageId("score", 0)):
        shutil.copytree(sampled.folder(stage), run.folder(stage))
    execute(run, run.config(), UPDATE, update.run, session)
    return run


def rows(run: RunDir, name: str) -> list[dict[str, Any]]:
    return read_table(run.folder(UPDATE), name, {"metrics": METRICS, "samples": SAMPLES}[name]).to_pylist()


def test_dapo_leaves_groups_without_signal_out_of_the_step_and_still_scores_them(
    sampled: RunDir, session: Session, tmp_path: Path
) -> None:
    words = ["update.loss=dapo", "update.correction=truncated", "update.correction_cap=1"]
    run = updated(sampled, session, tmp_path / "run", words)
    samples, metrics = rows(run, "samples"), rows(run, "metrics")
    silent = [row for row in samples if row["completion_id"].startswith("00000-000")]
    heard = [row for row in samples if row["completion_id"].startswith("00000-001")]
    assert len(silent) == len(heard) == 8
    assert {row["advantage"] for row in silent} == {0.0}
    assert not any(flag for row in silent for flag in row["loss_mask"])
    assert all(flag for row in heard for flag in row["loss_mask"])
    assert all(len(row["policy_logprobs"]) == len(row["loss_mask"]) for row in samples)
    # The completions with a signal are dealt evenly, four to each of the two steps, and only their tokens count.
    assert sum(row["tokens"] for row in metrics) == sum(len(row["loss_mask"]) for row in heard)
    assert all(row["tokens"] >= 4 and row["grad_norm"] > 0 for row in metrics)
    assert {row["zero_signal_groups"] for row in metrics} == {1}
    # engine and trainer agree but for rounding, so with a cap of 1 about half of the tokens are just above it
    weights = [weight for row in samples for weight in row["importance_weights"]]
    assert max(weights) <= 1.0
    assert min(weights) > 0.999
    assert 0.05 < metrics[0]["correction_fraction"] < 0.95
    for row in metrics:
        assert 0.999 < row["engine_ratio_min"] <= row["engine_ratio_mean"] <= row["engine_ratio_max"] < 1.001


def test_overlong_answers_earn_less_and_give_silent_groups_a_signal(
    sampled: RunDir, session: Session, tmp_path: Path
) -> None:
    run = updated(sampled, session, tmp_path / "run", ["update.overlong_tokens=48", "update.scale_rewards=none"])
    lengths = {
        row["completion_id"]: row["num_tokens"]
        for row in read_table(run.folder(StageId("rollout", 0)), "rollouts", ROLLOUTS).to_pylist()
    }
    silent = [row for row in rows(run, "samples") if row["completion_id"].startswith("00000-000")]
    own = torch.tensor([lengths[row["completion_id"]] for row in silent], dtype=torch.float64)
    assert own.std() > 0
    # -length / 48 each, against their mean
    expected = (own.mean() - own) / 48
    torch.testing.assert_close(torch.tensor([row["advantage"] for row in silent], dtype=torch.float64), expected)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_moves_the_policy_towards_what_was_rewarded(
    loss: str, sampled: RunDir, session: Session, tmp_path: Path
) -> None:
    run = updated(sampled, session, tmp_path / "run", [f"update.loss={loss}", "update.correction=masked"])
    rollouts = read_table(run.folder(StageId("rollout", 0)), "rollouts", ROLLOUTS).to_pylist()
    before = rows(run, "samples")
    samples = [
        Sample(row["completion_id"], tuple(row["prompt_ids"]), tuple(row["completion_ids"]), (), sample["advantage"])
        for row, sample in zip(rollouts, before, strict=True)
        if sample["advantage"] != 0
    ]
    trained = open_policy(context_of(run, session))
    assert trained.version == 1
    pack = Pack(tuple(samples))
    with torch.no_grad():
        now = completion_logprobs(trained, pack, temperature=1.0).logprobs.split(pack.lengths)
    old = [torch.tensor(row["policy_logprobs"]) for row in before if row["advantage"] != 0]
    gains = [
        float(new.mean() - was.mean()) * sample.advantage for new, was, sample in zip(now, old, samples, strict=True)
    ]
    assert len(gains) == 8
    assert sum(gains) > 0.01


def context_of(run: RunDir, session: Session) -> StageContext:
    return StageContext(run=run, config=run.config(), stage=UPDATE, out=run.path, session=session)


def test_what_is_left_out_is_dealt_evenly_and_so_is_the_rest() -> None:
    last = {0, 1, 2, 5, 8}
    dealt = update.deal(9, 2, seed=4, last=last)
    assert sorted(index for batch in dealt for index in batch) == list(range(9))
    assert [sum(index in last for index in batch) for batch in dealt] == [3, 2]
    assert [sum(index not in last for index in batch) for batch in dealt] == [2, 2]


def test_a_disagreement_of_engine_and_trainer_is_one_warning_with_its_cure(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = preset("tiny")
        update.warn_of_disagreement(3, 0.009, config)
        assert not caplog.records
        words = ["update.correction=truncated", "update.replay_routes=true", "model.dtype=bfloat16"]
        for index, engine_kl in enumerate((0.02, float("nan"), 0.02, 0.02)):
            update.warn_of_disagreement(3, engine_kl, overridden(config, words[:index]))
    first, second, third, fourth = (record.getMessage() for record in caplog.records)
    assert "iteration 3" in first
    assert "0.02" in first
    assert "update.correction=truncated" in first
    assert "update.replay_routes=true" in second
    assert "model.dtype=float32" in third
    assert "model.dtype=float16" in fourth
    assert "\n" not in first + second + third + fourth
    heading = "## When engine and trainer disagree"
    assert heading in (Path(__file__).parents[1] / "README.md").read_text()
    assert heading.removeprefix("## ") in first


@pytest.mark.parametrize("scaled", [False, True])
def test_a_policy_that_computes_what_is_not_finite_is_an_error_and_its_step_is_not_saved(
    sampled: RunDir, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    def broken(context: StageContext, version: int) -> Policy:
        policy = live_policy(context, version)
        policy.parameters()[0][1].data.fill_(float("nan"))
        return policy

    monkeypatch.setattr(update, "live_policy", broken)
    monkeypatch.setattr(update, "make_scaler", lambda policy: torch.amp.GradScaler("cpu", enabled=scaled))
    with pytest.raises(UserError, match="the loss of iteration 0, step 0 is not finite") as caught:
        updated(sampled, session, tmp_path / "run", [])
    assert "model.dtype=bfloat16" in str(caught.value.hint)
    assert not RunDir(tmp_path / "run").folder(UPDATE).exists()


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gradient_that_is_not_finite_is_an_error_but_under_loss_scaling_a_step_that_is_left_out(
    sampled: RunDir, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    hooks = []

    def overflowing(context: StageContext, version: int) -> Policy:
        policy = live_policy(context, version)
        hooks.append(policy.parameters()[0][1].register_hook(lambda grad: grad + float("inf")))
        return policy

    monkeypatch.setattr(update, "live_policy", overflowing)
    monkeypatch.setattr(update, "make_scaler", lambda policy: torch.amp.GradScaler("cpu", enabled=scaled))
    try:
        if not scaled:
            with pytest.raises(UserError, match="the gradient of iteration 0, step 0 is not finite"):
                updated(sampled, session, tmp_path / "run", [])
            return
        run = updated(sampled, session, tmp_path / "run", [])
    finally:
        for hook in hooks:
            hook.remove()
    assert [math.isfinite(row["grad_norm"]) for row in rows(run, "metrics")] == [False, False]
    adapter = load_file(run.folder(UPDATE) / "adapter_model.safetensors")
    assert all(not tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


def test_memory_that_runs_out_is_an_error_with_a_hint_and_leaves_no_gradient(
    sampled: RunDir, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs_out(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nmore")

    monkeypatch.setattr(update, "policy_loss", runs_out)
    with pytest.raises(UserError, match="memory ran out in update 0: CUDA out of memory") as caught:
        updated(sampled, session, tmp_path / "run", [])
    assert "update.memory_bytes" in str(caught.value.hint)
    assert not RunDir(tmp_path / "run").folder(UPDATE).exists()
    monkeypatch.undo()
    run = RunDir(tmp_path / "run")
    execute(run, run.config(), UPDATE, update.run, session)
    twin = updated(sampled, session, tmp_path / "twin", [])
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (run.folder(UPDATE) / name).read_bytes() == (twin.folder(UPDATE) / name).read_bytes()
