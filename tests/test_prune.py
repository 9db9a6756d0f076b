"""What `flexsink prune` deletes, and above all what it leaves alone."""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest

from flows import prune
from flows.train import stages_of
from stages.artifacts import RunDir, StageContext, StageId, survey
from stages.artifacts.journal import Journal
from stages.config import UserError
from tests import synthetic_run

CONFIG = synthetic_run.config_of(iterations=2, prompts=1, group_size=4, programs=4)
OLD = 0.0  # seconds since 1970: older than anything


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return synthetic_run.write(tmp_path / "runs" / "demo", CONFIG)


def answer(capsys: pytest.CaptureFixture[str], where: Path, *words: str) -> dict[str, Any]:
    parser = ArgumentParser()
    prune.add_arguments(parser)
    assert prune.prune(parser.parse_args([str(where), "--json", *words])) == 0
    seen: dict[str, Any] = json.loads(capsys.readouterr().out)
    return seen


def names(seen: dict[str, Any]) -> set[str]:
    return {Path(row["path"]).name for row in seen["found"]}


def files(path: Path) -> dict[str, bytes]:
    found = (each for each in path.rglob("*") if each.is_file() and not each.name.startswith(".lock"))
    return {str(each.relative_to(path)): each.read_bytes() for each in found}


def age(path: Path) -> None:
    for each in (path, *path.rglob("*")):
        os.utime(each, (OLD, OLD))


def test_a_whole_run_has_nothing_to_delete(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(run.path)
    assert answer(capsys, run.path, "--yes", "--exports")["found"] == []
    assert files(run.path) == before


def test_leftovers_are_named_and_go_only_with_yes(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    stale = run.path / "iterations" / "00000" / ".stale-score-0"
    dead = run.path / "iterations" / "00001" / f".tmp-{'0' * 64}"
    for folder in (stale, dead):
        folder.mkdir()
        (folder / "scores-00000.parquet").write_bytes(bytes(1000))
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    half = run.path / f".report.html.{process.pid}"
    half.write_text("half")
    living = run.path / f".config.json.{os.getpid()}"
    living.write_text("half")
    kept = {name: data for name, data in files(run.path).items() if ".stale" not in name and ".tmp" not in name}
    seen = answer(capsys, run.path)
    assert names(seen) == {stale.name, dead.name, half.name}
    assert (seen["deleted"], seen["bytes"]) == (False, 2004)
    assert stale.exists()
    assert dead.exists()
    assert answer(capsys, run.path, "--yes")["deleted"]
    assert files(run.path) == {name: data for name, data in kept.items() if name != half.name}
    assert answer(capsys, run.path)["found"] == []


def test_a_try_that_a_resume_goes_on_with_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def killed(context: StageContext) -> None:
        Journal(context.out / "verdicts.journal").append({"piece": 1})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic_run.write(tmp_path / "killed", CONFIG, score=killed)
    run = RunDir(tmp_path / "killed")
    tries = list(run.path.rglob(".tmp-*"))
    assert len(tries) == 1
    decisions = {str(stage): decision for stage, decision in survey(run, CONFIG, list(stages_of(CONFIG)))}
    assert tries[0].name == f".tmp-{decisions['score 0'].key}"
    # Beside it a try of a stage whose key is not known yet, as its rollout is not done: it may be wanted too.
    waiting = run.path / "iterations" / "00001" / f".tmp-{'1' * 64}"
    waiting.mkdir(parents=True)
    assert answer(capsys, run.path, "--yes")["found"] == []
    assert tries[0].exists()
    assert waiting.exists()


def test_after_pruning_a_resume_finds_everything_done(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    (run.path / "iterations" / "00000" / ".stale-score-0").mkdir()
    answer(capsys, run.path, "--yes", "--exports")
    decisions = survey(run, CONFIG, list(stages_of(CONFIG)))
    assert {decision.action for _, decision in decisions} == {"REUSE"}


def test_a_run_that_a_process_works_on_is_left_alone(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    stale = run.path / "iterations" / "00000" / ".stale-score-0"
    stale.mkdir()
    with run.lock():
        seen = answer(capsys, run.path.parent, "--yes", "--done-before", "0")
    assert seen["found"] == []
    assert seen["busy"] == [str(run.path)]
    assert stale.exists()
    holder = run.path / "iterations" / "00000" / ".lock-score"
    code = (
        "import sys; from filelock import FileLock\n"
        f"with FileLock({str(holder)!r}): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdin
        assert process.stdout.readline() == b"held\n"
        assert answer(capsys, run.path, "--yes")["busy"] == [str(run.path)]  # one stage of it alone is being run
        process.stdin.close()
    assert names(answer(capsys, run.path, "--yes")) == {stale.name}


def test_exports_of_other_formats_go_on_request_only(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    other = run.path / "export" / "fp16"
    other.mkdir()
    (other / "model.safetensors").write_bytes(bytes(5000))
    assert answer(capsys, run.path, "--yes")["found"] == []
    assert names(answer(capsys, run.path, "--yes", "--exports")) == {"fp16"}
    assert not other.exists()
    assert (run.path / "export" / "mxfp4" / "model.safetensors").exists()


def test_runs_done_long_ago_go_on_request_and_unfinished_ones_never(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.path.parent
    stopped = synthetic_run.write(folder / "stopped", CONFIG, upto=StageId("score", 1))
    for each in (run, stopped):
        age(each.path)
    young = synthetic_run.write(folder / "young", CONFIG)
    assert answer(capsys, folder)["found"] == []
    assert names(answer(capsys, folder, "--done-before", "30")) == {"demo"}
    answer(capsys, folder, "--done-before", "30", "--yes")
    assert [path.exists() for path in (run.path, stopped.path, young.path)] == [False, True, True]


def test_an_empty_run_goes_once_it_is_not_just_starting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir.create(tmp_path / "empty", CONFIG)
    assert answer(capsys, tmp_path, "--yes")["found"] == []
    age(run.path)
    assert names(answer(capsys, tmp_path, "--yes")) == {"empty"}
    assert not run.path.exists()


def test_a_run_that_cannot_be_read_is_left_alone(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    (run.path / "iterations" / "00000" / ".stale-score-0").mkdir()
    (run.path / "config.json").write_text('{"nonsense": 1}')
    age(run.path)
    assert answer(capsys, run.path.parent, "--yes", "--done-before", "0")["found"] == []


def test_a_link_is_deleted_and_not_what_it_points_to(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    precious = run.path.parent.parent / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    link = run.path / "iterations" / "00000" / ".stale-score-0"
    link.symlink_to(precious)
    assert names(answer(capsys, run.path, "--yes")) == {link.name}
    assert not link.is_symlink()
    assert (precious / "thesis.txt").exists()


def test_what_is_not_there_or_no_number_is_an_error_with_a_hint(tmp_path: Path) -> None:
    parser = ArgumentParser()
    prune.add_arguments(parser)
    for words in ([str(tmp_path / "none")], [str(tmp_path), "--done-before", "-1"]):
        with pytest.raises(UserError) as caught:
            prune.prune(parser.parse_args(words))
        assert caught.value.hint
