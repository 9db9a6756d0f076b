"""The export stage as a run meets it: on the card it takes the live policy's place."""

import gc
import io
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.config import overridden
from flows.presets import preset
from flows.progress import Lines
from flows.steps import local
from flows.train import loop
from stages import export
from stages.artifacts import RunDir, Session, StageId
from stages.model import excerpt
from stages.model.merge import write_merged
from stages.model.policy import Policy
from tests.test_engine import make_policy

SETTINGS = ["train.iterations=1", "rollout.prompts=2", "evaluate.programs=2", "sandbox.backend=local"]


def exported(folder: Path, settings: list[str]) -> tuple[RunDir, Any]:
    """A run with its export, and export.json."""
    run = RunDir.create(folder, overridden(preset("tiny_test"), SETTINGS + settings))
    config = run.config()
    with Session() as session:
        loop(config, local(run, config, session, Lines(io.StringIO())))
    return run, json.loads((run.folder(StageId("export", 1, config.export.format)) / "export.json").read_text())


def watch_loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many live policies there are each time one is loaded."""
    alive: weakref.WeakSet[Policy] = weakref.WeakSet()
    found: list[int] = []
    load = Policy.load.__func__  # type: ignore[attr-defined]

    def watched(cls: type[Policy], *given: Any, **named: Any) -> Policy:
        gc.collect()
        found.append(len(alive))
        policy: Policy = load(cls, *given, **named)
        alive.add(policy)
        return policy

    monkeypatch.setattr(Policy, "load", classmethod(watched))
    return found


def test_there_is_never_a_second_policy_beside_the_live_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("the test below does it on the card")
    loaded = watch_loads(monkeypatch)
    monkeypatch.setattr(export, "kept", lambda *_: 0.5)  # so that there is a residual adapter
    _, body = exported(tmp_path / "run", ["model.dense=nf4", "model.offload_embedding=true"])
    assert loaded == [0, 0]
    assert body["reloaded_layers"] == 4
    assert 0 <= body["kl_to_live"] < 0.01
    assert body["kl_with_residual"] < body["kl_to_live"]
    assert body["score_exported"] > 0
    assert "score_with_residual" in body


def test_what_the_host_cannot_hold_is_checked_in_part_and_what_the_card_cannot_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "layers_in_memory", lambda *_, **__: 2)
    monkeypatch.setattr(export, "too_large", lambda folder: "41.8 GB do not fit 15.1 GB")
    run, body = exported(tmp_path / "run", ["export.format=bf16"])
    assert body["reloaded_layers"] == 2
    assert body["reload"]["float32"] < 1e-4
    assert body["not_judged"] == "41.8 GB do not fit 15.1 GB"
    assert "score_exported" not in body
    folder = run.folder(StageId("export", 1, "bf16"))
    assert not [path for path in folder.iterdir() if path.is_dir()]
    assert excerpt.layers_in_memory(export.Checkpoint(folder).config, itemsize=4) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("dense", ["full", "nf4"])
def test_on_the_card_the_export_is_judged_in_the_live_policys_place(
    dense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = watch_loads(monkeypatch)
    monkeypatch.setattr(export, "kept", lambda *_: 0.5)  # so that there is a residual adapter
    settings = ["model.experts=mxfp4", "model.dtype=bfloat16", f"model.dense={dense}", "model.offload_embedding=true"]
    _, body = exported(tmp_path / "run", settings)
    assert loaded == [0, 0]
    assert body["reload"]["float32"] < 1e-4
    assert 0 <= body["kl_to_live"] < 0.05
    assert {"score_exported", "score_with_residual"} <= body.keys()


@pytest.mark.parametrize(("free", "fits"), [(10**9, True), (10**6, False)])
def test_a_dense_model_is_judged_where_the_card_has_room_and_a_packed_one_always(
    free: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(__file__).parents[1] / "data" / "tiny"
    dense = tmp_path / "dense"
    dense.mkdir()
    write_merged(make_policy(base), export.Checkpoint(base), dense, format="bf16")
    assert export.too_large(dense) == "" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 10**9))
    assert (export.too_large(dense) == "") is fits
    assert export.too_large(base) == ""
