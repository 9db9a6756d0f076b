"""The command line: quick help, and one line with a hint for whatever can be expected to go wrong."""

import importlib.metadata
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from flows import cli, doctor, server
from flows.config import overridden, resolved
from flows.presets import preset
from flows.steps import default_path, local, logging_to
from flows.train import loop
from stages.artifacts import RunDir, Session
from stages.config import UserError
from stages.model.synthetic import SHAPES
from tests import small_stages
from tests.bench import on_gpu
from tests.patience import PATIENCE_S
from tests.test_flow import Lines

ROOT = Path(__file__).parent.parent
HEAVY = ("pyarrow", "rich", "torch", "prefect", "docker", "numpy", "transformers", "textual")


def flexsink(*words: str, cwd: Path = ROOT, small: bool = False, **extra: str) -> Any:
    """The command's exit code and output, in a process of its own."""
    module = "tests.small_stages" if small else "flows.cli"
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | extra
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


def assert_refused(done: Any, message: str, hint: str = "") -> None:
    """Exit code 2, one error line with the message, one hint line, nothing else."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], done.stderr
    assert message in lines[0]
    assert hint in lines[1]


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A whole run of small stages."""
    for name in ("load", "rollout", "score", "update", "evaluate", "export"):
        monkeypatch.setitem(sys.modules, f"stages.{name}", sys.modules.get(f"stages.{name}"))
    small_stages.install()
    config = resolved(preset("tiny_test"))
    run = RunDir.create(tmp_path / "run", config)
    with Session() as session, open(os.devnull, "w") as nowhere, Lines(nowhere) as view:
        loop(config, local(run, config, session, view))
    return run


@pytest.mark.timed
def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = "import sys\nfrom flows.cli import dispatch\ntry:\n    dispatch(['--help'])\nexcept SystemExit:\n    pass\n"
    code += f"print([name for name in {HEAVY} if name in sys.modules])"
    fastest = 60.0
    for _ in range(5):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        fastest = min(fastest, time.perf_counter() - started)
        assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "train" in done.stdout
    assert fastest < 0.6  # the bar is 0.3 s on a machine that does nothing else


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "resume",
        "plan",
        "inspect",
        "view",
        "runs",
        "prune",
        "report",
        "evaluate",
        "export",
        "serve",
        "self-check",
        "bench",
        "compare-attention",
    ],
)
def test_every_command_has_a_help(command: str) -> None:
    done = flexsink(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"flexsink {command}" in done.stdout


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["train", "tinny"], "unknown preset 'tinny'", "did you mean tiny?"),
        (["train", "tiny", "train.iteration=2"], "unknown key train.iteration", "did you mean train.iterations?"),
        (
            ["train", "tiny", "train.iterations=two"],
            "train.iterations must be a whole number, not 'two'",
            "for example",
        ),
        (["train", "tiny", "task.name=chess"], "unknown task 'chess'", ""),
        (["train", "tiny", "task.name=matmul", "task.trials=0"], "task.trials is 0", "timed 1 to 99 times"),
        (["train", "tiny", "sandbox.backend=local", "--runner", "docker"], "not with sandbox.backend", "runner"),
        (["train"], "PRESET", "flexsink train --help"),
        (["trian", "tiny"], "invalid choice: 'trian'", "did you mean train? see flexsink --help"),
        (["train", "tiny", "--rundir", "x"], "--rundir", "did you mean --run-dir? see flexsink train --help"),
        (["train", "tiny", "lora_rank=3"], "is not section.key=value", "did you mean update.lora_rank=3?"),
        (["train", "tiny", "update.lora_rank=0"], "must be 1 to 65536", "for example update.lora_rank=8"),
        (["view", "--tab", "tokens"], "--tab shows a completion", "--completion"),
        (["view", "--snapshot", "x.png"], "the picture is an SVG", ".svg"),
        (["resume", "/nowhere/run"], "/nowhere/run holds no run", "flexsink runs"),
        (["plan", "tinny"], "unknown preset 'tinny'", "did you mean tiny?"),
        (["plan", "data/runs/none"], "data/runs/none holds no run", "flexsink runs"),
        (["evaluate", "/nowhere/run"], "/nowhere/run holds no run", ""),
        (["export", "/nowhere/run", "--out", "/tmp/x"], "/nowhere/run holds no run", ""),
        (["export", "/nowhere/run"], "--out", "flexsink export --help"),
        (["inspect", "/nowhere/run"], "/nowhere/run", ""),
        (["view", "/nowhere/run"], "/nowhere/run holds no run", "flexsink runs"),
        (["view", "--size", "big"], "is no size such as 100x32", "flexsink view --help"),
        (["prune", "/nowhere/run"], "there is no folder /nowhere/run", "flexsink runs"),
        (["bench"], "WHAT", "flexsink bench --help"),
        (["bench", "score", "--games", "0"], "--games is 0", "at least 1"),
    ],
)
def test_bad_words_are_one_error_and_one_hint(words: list[str], message: str, hint: str) -> None:
    assert_refused(flexsink(*words), message, hint)


def test_settings_may_stand_before_and_behind_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(cli, "train_command", lambda args: seen.append(args) or 0)
    words = ["train.seed=1", "--runner", "docker", "steps.gpus=none", "--run-dir", "run", "train.iterations=3"]
    assert cli.dispatch(["train", "tiny", *words]) == 0
    (args,) = seen
    assert args.overrides == ["train.seed=1", "steps.gpus=none", "train.iterations=3"]
    assert (args.preset, args.runner, args.run_dir) == ("tiny", "docker", Path("run"))
    for wrong in (["--dry=1"], ["twice"], ["train.seed=2", "--dry"]):
        with pytest.raises(UserError, match="unrecognized arguments: .*" + wrong[-1]):
            cli.dispatch(["train", "tiny", "--runner", "docker", *wrong])
    with pytest.raises(UserError, match=r"unrecognized arguments: train\.seed=1"):
        cli.dispatch(["doctor", "train.seed=1"])


def test_no_docker_is_said_before_anything_is_written(tmp_path: Path) -> None:
    done = flexsink("train", "tiny", "--run-dir", str(tmp_path / "run"), DOCKER_HOST=f"unix://{tmp_path}/dead.sock")
    assert_refused(done, "no Docker daemon answers", "start Docker")
    assert not (tmp_path / "run").exists()


@pytest.mark.docker
def test_a_folder_of_another_config_is_refused_and_the_difference_shown(finished: RunDir) -> None:
    before = (finished.path / "config.json").read_bytes()
    done = flexsink("train", "tiny_test", "train.seed=4", "--run-dir", str(finished.path), small=True)
    assert_refused(done, "holds a run of another configuration: train.seed 0 -> 4", f"flexsink resume {finished.path}")
    assert (finished.path / "config.json").read_bytes() == before


def test_resume_refuses_what_is_in_a_key(finished: RunDir) -> None:
    done = flexsink("resume", str(finished.path), "train.seed=4", small=True)
    assert_refused(done, "resume cannot change train.seed 0 -> 4", "start a new run")


@pytest.mark.docker
def test_resume_takes_the_memory_that_an_update_is_told_to_keep_to(prefect_server: str, finished: RunDir) -> None:
    words = ("resume", str(finished.path), "update.memory_bytes=12000000000")
    done = flexsink(*words, small=True, PREFECT_API_URL=prefect_server)
    assert (done.returncode, done.stderr) == (0, "")
    assert "reused        10 stages" in done.stdout
    assert finished.config().update.memory_bytes == 12_000_000_000


def test_a_config_that_is_not_one_is_refused(finished: RunDir) -> None:
    (finished.path / "config.json").write_text('{"train": {"iterations":')
    assert_refused(flexsink("resume", str(finished.path)), "the configuration is not JSON", "restore config.json")


@pytest.mark.docker
def test_a_photo_folder_is_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_text("cat")
    done = flexsink("train", "tiny_test", "--run-dir", str(tmp_path), small=True)
    assert_refused(done, "is not empty and holds no run", "--run-dir")
    assert os.listdir(tmp_path) == ["cat.jpg"]


@pytest.fixture
def fixed(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system that is mounted read-only."""
    yield from mounted(tmp_path / "fixed", "ro,size=64k")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 32 KiB."""
    yield from mounted(tmp_path / "small", "size=32k")


def mounted(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path]).returncode:
        pytest.skip("mounting a file system needs root")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.docker
def test_a_read_only_folder_is_refused(fixed: Path) -> None:
    done = flexsink("train", "tiny_test", "--run-dir", str(fixed / "run"), small=True)
    assert_refused(done, "read-only file system", "choose another folder with --run-dir")


@pytest.mark.docker
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_space(prefect_server: str, small_disk: Path) -> None:
    path = small_disk / "run"
    done = flexsink("train", "tiny_test", "--run-dir", str(path), small=True, PREFECT_API_URL=prefect_server)
    assert_refused(done, "the disk is full", "free some space")
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    done = flexsink("resume", str(path), small=True, PREFECT_API_URL=prefect_server)
    assert done.returncode == 0, done.stderr


@pytest.mark.docker
def test_a_run_that_fails_before_anything_is_made_leaves_no_folder(prefect_server: str, tmp_path: Path) -> None:
    words = ("train", "tiny_test", f"model.source={tmp_path / 'none'}", "--run-dir", str(tmp_path / "run"))
    done = flexsink(*words, PREFECT_API_URL=prefect_server)
    assert_refused(done, str(tmp_path / "none"))
    assert not (tmp_path / "run").exists()


def train_failing(path: Path, monkeypatch: pytest.MonkeyPatch, during: Callable[[RunDir], None]) -> UserError:
    """What `flexsink train` says when the flow fails after `during`, before any stage is made."""

    def go(run: RunDir, config: Any) -> int:
        with run.lock(), logging_to(run, config.logging):
            during(run)
        raise UserError("it went wrong", "wait, then go on with: flexsink resume RUN")

    monkeypatch.setattr(cli, "go", go)
    monkeypatch.setattr("flows.steps.check_sandbox", lambda backend: None)
    with pytest.raises(UserError, match="it went wrong") as raised:
        cli.dispatch(["train", "tiny_test", "--run-dir", str(path)])
    return raised.value


def test_a_failed_train_takes_its_own_files_along_and_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    (path / "logs").mkdir(parents=True)
    (path / "logs/slurm-1.out").write_text("a job's output")
    error = train_failing(path, monkeypatch, lambda run: server.remember(run, "a flow run"))
    assert error.hint == "wait, then give the same command again"
    assert sorted(str(each.relative_to(path)) for each in path.rglob("*")) == ["logs", "logs/slurm-1.out"]
    (path / "logs/slurm-1.out").unlink()
    train_failing(path, monkeypatch, lambda run: (run.path / ".tmp-0/deep").mkdir(parents=True))
    assert not path.exists()


def test_a_failed_train_leaves_a_run_that_another_process_works_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    with ExitStack() as other:
        command = "import sys, pathlib, stages.artifacts as a\nwith a.RunDir(pathlib.Path(sys.argv[1])).lock():\n"
        command += "    print(flush=True)\n    input()"

        def go(run: RunDir, config: Any) -> int:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = other.enter_context(subprocess.Popen([sys.executable, "-c", command, str(path)], **pipes))
            other.callback(process.stdin.close)
            assert process.stdout.readline()
            with run.lock():
                return 0

        monkeypatch.setattr(cli, "go", go)
        monkeypatch.setattr("flows.steps.check_sandbox", lambda backend: None)
        with pytest.raises(UserError, match="being worked on") as raised:
            cli.dispatch(["train", "tiny_test", "--run-dir", str(path)])
        assert (path / "config.json").exists()
        assert raised.value.hint == "wait until it has finished, or end it"


def test_two_runs_that_begin_in_one_second_get_a_folder_each(tmp_path: Path) -> None:
    paths = [default_path(tmp_path / "runs", "tiny") for _ in range(3)]
    assert len(set(paths)) == 3
    assert sorted(paths) == sorted((tmp_path / "runs").iterdir())


def test_plan_shows_what_would_run_and_why(finished: RunDir) -> None:
    done = flexsink("plan", str(finished.path))
    assert done.returncode == 0, done.stderr
    assert "0 to run, 10 to reuse" in done.stdout
    (finished.path / "iterations/00001/score/scores-00000.parquet").unlink()
    lines = flexsink("plan", str(finished.path)).stdout.splitlines()
    rows = {line[:13].strip(): line[13:].strip().split(None, 1) for line in lines}
    assert rows["score 1"] == ["RUN", "scores-00000.parquet is missing"]
    assert rows["update 1"] == ["RUN", "unless score 1 comes out as before"]
    assert rows["rollout 1"][0] == "REUSE"
    assert "4 to run, 6 to reuse" in lines
    assert "train.iterations" not in (flexsink("plan", str(finished.path), "train.iterations=3").stderr)


def test_plan_of_a_preset_explains_every_setting_and_counts_the_stages() -> None:
    done = flexsink("plan", "tiny_test", "train.iterations=1", "task.size=5", COLUMNS="500")
    *rows, _, stages = done.stdout.splitlines()[1:]
    assert stages == "7 stages to run: load; 1 x (rollout, score, update); evaluate 0, 1; export mxfp4"
    told = {key: re.split("  +", rest.strip()) for key, _, rest in (row.partition(" ") for row in rows)}
    config = resolved(overridden(preset("tiny_test"), ["train.iterations=1", "task.size=5"]))
    assert told.keys() == config.flat().keys()
    assert [key for key, cells in told.items() if len(cells) != 2 and key != "sandbox.runtime"] == []
    assert told["train.iterations"] == ["1 (preset: 2)", "rollout-score-update rounds"]
    assert told["task.size"] == ["5 (preset: 4)", "cells a side, 3 to 8"]
    assert told["export.format"] == ["mxfp4", "mxfp4 | fp16 | bf16 | adapter: what the last stage writes"]


def test_without_words_the_help_is_shown_and_the_version_on_request() -> None:
    assert "commands:" in flexsink().stdout
    assert flexsink("--version").stdout == f"flexsink {importlib.metadata.version('flexsink')}\n"


@pytest.mark.docker
def test_export_delivers_a_folder_once_and_is_strict_on_request(finished: RunDir, tmp_path: Path) -> None:
    words = ("export", str(finished.path), "--format", "mxfp4", "--out", str(tmp_path / "model"))
    done = flexsink(*words, small=True)
    assert done.returncode == 0, done.stderr
    assert "keeps 50 % of the gain" in done.stdout
    assert sorted(os.listdir(tmp_path / "model")) == ["export.json", "model.txt"]
    assert_refused(flexsink(*words, small=True), "is there already", "--out")
    other = ("export", str(finished.path), "--format", "bf16", "--out", str(tmp_path / "other"), "--strict")
    done = flexsink(*other, small=True)
    assert done.returncode == 3, done.stderr
    assert (finished.path / "export/bf16/manifest.json").exists()
    assert (finished.path / "export/mxfp4/manifest.json").exists()


@pytest.mark.docker
def test_evaluate_prints_the_policys_figures(finished: RunDir) -> None:
    done = flexsink("evaluate", str(finished.path), small=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reused")
    assert "5 distinct of 8 programs" in done.stdout
    assert_refused(
        flexsink("evaluate", str(finished.path), "--updates", "9", small=True), "evaluate 9 is not in this run"
    )


def test_a_stage_alone_says_what_it_is_missing(finished: RunDir) -> None:
    (finished.path / "load/model.json").unlink()
    command = [sys.executable, "-m", "stages.score", "--run-dir", str(finished.path), "--iteration", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert_refused(done, "score 0 needs load: model.json is missing", f"flexsink resume {finished.path}")


@pytest.mark.docker
def test_the_doctor_finds_this_machine_fit() -> None:
    failing = [line for line in doctor.check() if not line.ok]
    assert failing == []


def test_the_doctor_has_a_hint_for_what_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/dead.sock")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    monkeypatch.chdir(tmp_path)
    failing = {line.name: line for line in doctor.check() if not line.ok}
    assert {"docker", "sandbox image", "tiny model", "prefect"} <= set(failing)
    assert all(line.hint for line in failing.values())


@pytest.mark.parametrize("name", [name for name, words in on_gpu.JOBS.items() if "cli bench" in words])
def test_what_is_measured_on_a_gpu_is_understood(name: str) -> None:
    words = on_gpu.command(name, Path("out"))
    args = cli.parser().parse_args(words[words.index("flows.cli") + 1 :])
    assert args.out == Path("out") / f"{name}.json"
    assert args.shape in SHAPES
