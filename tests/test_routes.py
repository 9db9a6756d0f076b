"""The experts that the engine chose, recorded by it and used again by the update."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssForCausalLM

from flows.config import overridden
from flows.presets import preset
from stages import load, rollout, update
from stages.artifacts import RunDir, Session, StageContext, StageId, execute
from stages.artifacts.keys import STAGES, inputs_of, key_of, upstream_of
from stages.artifacts.parquet import METRICS, ROLLOUTS, SAMPLES, read_table, scores_schema, write_parts
from stages.config import RunConfig
from stages.engine import Completion, Engine, Request, SamplingParams
from stages.engine import paged_run as paged_run_module
from stages.engine.paged_engine import PagedEngine
from stages.engine.routes import row_shape
from tests.plain_step import PlainStep
from tests.random_gpt_oss import make_config
from tests.remembering_step import (
    assert_as_expected,
    assert_routes_as_expected,
    budget,
    remembering_engine,
    requests_of,
    run,
)
from tests.test_engine import ROUTER_TIE, make_policy, merged_eager, prompt_of


def grouped(lengths: tuple[int, ...], *, group: int, new: int) -> list[Request]:
    """`group` requests for each prompt length, with limits from 1 on."""
    return [
        Request(
            completion_id=f"{length}-{place}",
            prompt_ids=prompt_of(length),
            sampling=SamplingParams(max_new_tokens=1 + (5 * place + length) % new, seed=100 * length + place),
        )
        for length in lengths
        for place in range(group)
    ]


def assert_routes_of(eager: GptOssForCausalLM, completions: list[Completion]) -> None:
    """The sets are those of transformers' routers on prompt and completion at once, but where two experts tie."""
    ties = 0
    for completion in completions:
        chosen, gaps = eager_routes(eager, completion.prompt_ids + completion.completion_ids[:-1])
        routes = completion.routes
        assert routes is not None
        assert (routes.dtype, routes.shape) == (torch.uint8, chosen.shape)
        differ = (routes.long().sort(-1).values != chosen.sort(-1).values).any(-1)
        tied = gaps < ROUTER_TIE
        ties += int(tied.sum())
        # What follows a tie may differ: its own layer and the ones behind, for it and for what attends to it.
        if tied.any():
            differ = differ[: int(tied.any(-1).nonzero()[0])]
        assert not differ.any(), f"{completion.completion_id}: {differ.nonzero()[:3].tolist()}"
    assert ties < 3


@torch.no_grad()
def eager_routes(eager: GptOssForCausalLM, ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The experts int64 [T, layers, k] that the routers' own outputs name, and how far the next best is [T, layers]."""
    noted: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.mlp.router.register_forward_hook(lambda _, __, out: noted.append((out[0], out[2])))
        for layer in eager.model.layers
    ]
    try:
        eager(torch.tensor([ids]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    logits, chosen = (torch.stack(each, dim=1) for each in zip(*noted, strict=True))
    ordered = logits.sort(-1, descending=True).values
    return chosen, ordered[..., chosen.shape[-1] - 1] - ordered[..., chosen.shape[-1]]


def test_recorded_routes_are_those_of_transformers_for_shared_prompts_and_refilled_slots(
    random_checkpoint: Path,
) -> None:
    policy = make_policy(random_checkpoint)
    eager = merged_eager(policy, random_checkpoint)
    requests = grouped((1, 126, 131), group=7, new=12)  # 21 in 16 slots, over the window's edge
    completions = Engine(policy, max_slots=16, max_new_tokens=12, record_routes=True).run(requests)
    assert_routes_of(eager, completions)
    plain = Engine(policy, max_slots=16, max_new_tokens=12).run(requests)
    assert plain == completions  # to the bit: recording changes nothing
    assert {completion.routes for completion in plain} == {None}


def test_the_paged_loop_records_the_same_in_few_slots_and_with_chunked_prompts(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_run_module, "PREFILL_TOKENS", 100)
    policy = make_policy(random_checkpoint)
    paged = PagedEngine(policy, max_slots=3, max_new_tokens=6, step=PlainStep, record_routes=True)
    completions = run(paged, grouped((5, 130, 250), group=4, new=6))
    assert paged.stats.prefill_tokens == 5 + 130 + 250
    assert_routes_of(merged_eager(policy, random_checkpoint), completions)


@pytest.mark.parametrize("pages", [6, 40])
def test_each_token_has_its_own_routes_however_slots_pages_and_prompts_are_shared(
    pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_run_module, "PREFILL_TOKENS", 150)
    requests = requests_of(60, seed=pages)
    engine = remembering_engine(cache_bytes=budget(pages), record_routes=True)
    for _ in range(2):
        completions = run(engine, requests)
        assert_as_expected(completions, requests)
        assert_routes_as_expected(completions)


def test_more_experts_than_a_byte_can_tell_apart_are_refused() -> None:
    assert row_shape(make_config(num_local_experts=256)) == (4, 4)
    with pytest.raises(ValueError, match="at most 256 experts a layer, not 257"):
        row_shape(make_config(num_local_experts=257))


SETTINGS = ["rollout.max_new_tokens=24", "train.iterations=1", "update.kl=0.01", "update.replay_routes=true"]
UPDATE = StageId("update", 0)
recorded = update.routes_of


def rewards_by_length(context: StageContext) -> None:
    rows = read_table(context.input(StageId("rollout", 0)), "rollouts", ROLLOUTS).to_pylist()
    scored = [
        {
            "completion_id": row["completion_id"],
            "outcome": "ok",
            "reward": len(set(row["completion_ids"])),
            "reward_x": 0.0,
        }
        for row in rows
    ]
    write_parts(context.out, "scores", scored, scores_schema(["reward_x"]))


def updated(run: RunDir, session: Session) -> dict[str, list[dict[str, Any]]]:
    execute(run, run.config(), UPDATE, update.run, session)
    schemas = {"metrics": METRICS, "samples": SAMPLES}
    return {name: read_table(run.folder(UPDATE), name, schema).to_pylist() for name, schema in schemas.items()}


def test_the_policy_is_updated_by_the_recorded_routes_and_compared_with_a_reference_by_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = (
        RunDir.create(tmp_path / name, overridden(preset("tiny_test"), SETTINGS)) for name in ("run", "other")
    )
    functions = {"load": load.run, "rollout": rollout.run, "score": rewards_by_length}
    with Session() as session:
        for stage in (StageId("load"), StageId("rollout", 0), StageId("score", 0)):
            execute(run, run.config(), stage, functions[stage.name], session)
            shutil.copytree(run.folder(stage), other.folder(stage))
        true = updated(run, session)
        monkeypatch.setattr(update, "routes_of", lambda row, top_k: (recorded(row, top_k) + 1) % 8)
        false = updated(other, session)
    rollouts = read_table(run.folder(StageId("rollout", 0)), "rollouts", ROLLOUTS).to_pylist()
    for row in rollouts:
        assert len(row["routes"]) == (len(row["prompt_ids"]) + row["num_tokens"] - 1) * 4 * 4
    for row in true["metrics"]:
        assert 0 <= row["engine_kl"] < 1e-9
        assert 0 <= row["routes_differ"] < 1e-4
        assert row["grad_norm"] > 0
    for row in false["metrics"]:
        assert row["engine_kl"] > 0.01
        assert row["routes_differ"] > 0.5
    for ours, shifted, row in zip(true["samples"], false["samples"], rollouts, strict=True):
        policy, reference, engine = (
            torch.tensor(values)
            for values in (ours["policy_logprobs"], ours["reference_logprobs"], row["engine_logprobs"])
        )
        assert (policy - engine).abs().max() < 1e-4
        assert (policy - reference).abs().max() < 1e-4  # nothing is trained yet
        assert shifted["reference_logprobs"] == ours["reference_logprobs"]
        assert (torch.tensor(shifted["policy_logprobs"]) - policy).abs().max() > 0.01


def test_without_replay_no_routes_are_recorded_and_none_are_said_to_differ(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", overridden(preset("tiny_test"), [*SETTINGS[:-1], "rollout.max_new_tokens=4"]))
    functions = {"load": load.run, "rollout": rollout.run, "score": rewards_by_length}
    with Session() as session:
        for stage in (StageId("load"), StageId("rollout", 0), StageId("score", 0)):
            execute(run, run.config(), stage, functions[stage.name], session)
        tables = updated(run, session)
    rollouts = read_table(run.folder(StageId("rollout", 0)), "rollouts", ROLLOUTS)
    assert rollouts["routes"].null_count == len(rollouts) == 16
    assert [row["routes_differ"] for row in tables["metrics"]] == [None, None]


def test_rollout_and_update_are_made_again_when_the_key_changes_and_nothing_else_is() -> None:
    off = RunConfig()
    on = overridden(off, ["update.replay_routes=true"])
    changed = []
    for name in STAGES:
        stage = StageId(name, 0 if name not in ("load", "export") else None, "mxfp4" if name == "export" else "")
        digests = {each: "0" * 64 for each in upstream_of(stage)}
        if key_of(inputs_of(stage, on, digests)) != key_of(inputs_of(stage, off, digests)):
            changed.append(name)
    assert changed == ["rollout", "update"]
