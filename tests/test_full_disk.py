"""Disks that are really full: what each way of writing says of them, and what it leaves."""

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError

from flows.delivery import deliver
from flows.summary import finish
from flows.tracking import Tracking
from stages.artifacts import RunDir, Session, StageContext, StageId, execute
from stages.config import UserError, replace
from stages.model import checkpoint, files, merge
from stages.model.files import save_tensors
from stages.model.policy import Policy
from stages.report import write_report
from stages.trainer.optimizer import save_optimizer
from tests import synthetic_run
from tests.test_cli import mounted
from tests.test_engine import make_policy


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 64 KiB."""
    yield from mounted(tmp_path / "small", "size=64k")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    config = synthetic_run.config_of(iterations=1, prompts=2, group_size=4, programs=4)
    return synthetic_run.write(tmp_path_factory.mktemp("run") / "run", config)


def fill(folder: Path) -> None:
    """Leaves no byte free there."""
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while file.write(b"x" * 512):
            pass
    assert shutil.disk_usage(folder).free == 0


def save_optimizer_of(policy: Policy, folder: Path) -> None:
    parameters = [parameter for _, parameter in policy.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_optimizer(folder, policy, optimizer, 1)


def save_merged(policy: Policy, folder: Path) -> None:
    merge.write_merged(policy, checkpoint.Checkpoint(Path(policy.source)), folder, format="bf16")


@pytest.mark.parametrize("save", [Policy.save_adapter, save_optimizer_of, save_merged])
def test_weights_that_do_not_fit_are_told_as_a_full_disk(
    save: Callable[[Policy, Path], Any], random_checkpoint: Path, small_disk: Path
) -> None:
    policy = make_policy(random_checkpoint)
    run = RunDir.create(small_disk / "run", synthetic_run.config_of(iterations=1, prompts=2, group_size=4, programs=4))

    def function(context: StageContext) -> None:
        save(policy, context.out)

    with Session() as session, pytest.raises(UserError, match="the disk is full") as raised:
        execute(run, run.config(), StageId("load"), function, session)
    assert "free some space" in raised.value.hint


def test_what_safetensors_refuses_for_another_reason_stays_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        save_tensors({"a": torch.zeros(2)}, tmp_path / "missing/a.safetensors")
    assert missing.value.errno == errno.ENOENT
    monkeypatch.setattr(files, "save_file", mock.Mock(side_effect=SafetensorError("Error while serializing: 28")))
    with pytest.raises(SafetensorError, match="serializing: 28"):
        save_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")


def test_an_export_that_does_not_fit_is_told_and_leaves_nothing(tmp_path: Path, small_disk: Path) -> None:
    export = tmp_path / "export"
    (export / "residual").mkdir(parents=True)
    for name in ("a.json", "residual/b.safetensors"):
        (export / name).write_bytes(os.urandom(40_000))
    (export / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=f"the disk is full: {small_disk / 'out'}"):
        deliver(export, small_disk / "out")
    assert os.listdir(small_disk) == []
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    deliver(export, small_disk / "out")
    found = {str(path.relative_to(small_disk / "out")) for path in (small_disk / "out").rglob("*") if path.is_file()}
    assert found == {"a.json", "residual/b.safetensors"}
    assert (small_disk / "out/a.json").read_bytes() == (export / "a.json").read_bytes()


def test_a_report_that_does_not_fit_is_told_and_leaves_no_part(finished: RunDir, small_disk: Path) -> None:
    with pytest.raises(UserError, match="the disk is full"):
        write_report(finished.path, out=small_disk / "report.html")
    assert os.listdir(small_disk) == []


def test_a_report_goes_to_a_folder_that_is_made_for_it(finished: RunDir, tmp_path: Path) -> None:
    path = write_report(finished.path, out=tmp_path / "missing/x.html")
    assert path.read_text().startswith("<!doctype html>")
    with pytest.raises(UserError, match="is a file, not a folder"):
        write_report(finished.path, out=path / "x.html")


def test_a_finished_run_without_room_for_its_report_has_not_failed(finished: RunDir, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    subprocess.run(["cp", "-r", finished.path, small_disk / "run"], check=True)
    fill(small_disk)
    notes: list[str] = []
    finish(RunDir(small_disk / "run"), notes.append)
    assert notes[-1].startswith("report      not written: the disk is full")


def test_a_tracker_fails_no_run_on_a_full_disk(
    finished: RunDir, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Tracker:
        calls = 0

        def log(self, values: dict[str, float], step: int) -> None:
            self.calls += 1

    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    subprocess.run(["cp", "-r", finished.path, small_disk / "run"], check=True)
    run = RunDir(small_disk / "run")
    config = replace(run.config(), "logging", tracker="prometheus")
    fill(small_disk)
    tracker = Tracker()
    tracking = Tracking(run, config, tracker)
    for stage in synthetic_run.stages_of(config):
        tracking.finish(stage, seconds=1.0, reused=False)
    assert tracker.calls
    assert "what the tracker was told is not noted: [Errno 28]" in caplog.text


@pytest.mark.parametrize("of_rust", [False, True])
def test_a_download_that_does_not_fit_is_no_fault_of_the_network(
    of_rust: bool, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(source: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        try:
            (small_disk / "model.safetensors").write_bytes(b"x" * 200_000)
        except OSError as error:
            raise RuntimeError(f"IO Error: {error.strerror} (os error {error.errno})" if of_rust else "lost") from (
                None if of_rust else error
            )
        return str(small_disk)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match="the disk is full") as raised:
        checkpoint.locate("somebody/gpt-oss-tiny")
    assert "HF_HOME" in raised.value.hint
    monkeypatch.setattr(checkpoint, "cached", lambda source: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="cannot fetch") as raised:
        checkpoint.locate("somebody/gpt-oss-tiny")
    assert "network" in raised.value.hint
