"""The real flow on the bundled model: killed anywhere, damaged anywhere, it ends with the artifacts of a quiet run.

FLEXSINK_KILLS says at how many random moments the flow is killed (3); FLEXSINK_KILL_SEED repeats a failing choice.
"""

import contextlib
import fnmatch
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flows import server
from stages.artifacts import RunDir
from tests import killed_flow, network_watch
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("FLEXSINK_KILLS", "3"))
pytestmark = [pytest.mark.slow, pytest.mark.docker]


class Flow:
    """`flexsink` with real stages, against the test session's Prefect server, in the project's folder."""

    def __init__(self, url: str) -> None:
        self.environment = os.environ | {"PREFECT_API_URL": url, "PYTHONPATH": str(ROOT)}

    def start(self, *words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *words],
            cwd=ROOT,
            env=self.environment,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str, str]:
        process = self.start(*words)
        output, errors = process.communicate(timeout=PATIENCE_S)
        return process.returncode, output, errors

    def resume(self, path: Path) -> str:
        code, output, errors = self.run("resume", str(path))
        assert (code, errors) == (0, "")
        return output


@pytest.fixture(scope="module")
def flow(prefect_server: str) -> Flow:
    return Flow(prefect_server)


class FirstRun(NamedTuple):
    path: Path
    seconds: float
    # without the start of a server
    output: str
    errors: str
    spoken_to: str
    # what tests/network_watch.py noted


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> FirstRun:
    """A run that nothing disturbed, the first on its machine: without a server, a home or a cache."""
    folder = tmp_path_factory.mktemp("quiet")
    path, watched = folder / "run", folder / "network.txt"
    for name in ("home", "data", "watch"):
        (folder / name).mkdir()
    (folder / "data/tiny").symlink_to(ROOT / "data/tiny")
    (folder / "watch/sitecustomize.py").write_text(network_watch.PROGRAM)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "HF_"))}
    environment |= {"HOME": str(folder / "home"), "NETWORK_WATCH": str(watched)}
    environment |= {"PYTHONPATH": f"{folder / 'watch'}:{ROOT}"}
    command = [sys.executable, "-m", "flows.cli", "train", "tiny_test", "--run-dir", str(path)]
    started = time.monotonic()
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
        seconds = time.monotonic() - started
    finally:
        server.stop(folder / "data/.prefect")
    assert done.returncode == 0, done.stderr
    state = folder / "data/.prefect"
    seconds -= (path / "logs/flow_runs.txt").stat().st_mtime - (state / ".lock").stat().st_mtime
    spoken_to = watched.read_text() if watched.exists() else ""
    return FirstRun(path, seconds, done.stdout, done.stderr, spoken_to)


@pytest.fixture(scope="module")
def quiet_run(first_run: FirstRun) -> tuple[Path, float]:
    return first_run.path, first_run.seconds


def test_the_first_run_on_a_machine_warns_of_nothing_and_speaks_to_no_other_machine(first_run: FirstRun) -> None:
    assert first_run.errors == ""
    assert first_run.spoken_to == ""
    lines = first_run.output.splitlines()
    assert lines[:2] == [f"run {first_run.path}", "starting the project's Prefect server"]
    assert [line[:9].strip() for line in lines[2:5]] == ["load", "evaluate", "rollout 0"]
    assert not [line for line in lines if "warn" in line.lower() or "deprecat" in line.lower()]


def test_an_export_is_used_as_the_readme_says(quiet_run: tuple[Path, float], tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().partition("## Use what was trained")[2]
    program = section.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "data/runs").mkdir(parents=True)
    (tmp_path / "data/runs/demo").symlink_to(quiet_run[0])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    prompt, _, answer = done.stdout.partition("<|start|>assistant")
    assert "plays 2048" in prompt
    assert len(answer) > 20


@pytest.fixture
def copied(quiet_run: tuple[Path, float], tmp_path: Path) -> Path:
    shutil.copytree(quiet_run[0], tmp_path / "run")
    return tmp_path / "run"


def below(path: Path, pattern: str) -> list[Path]:
    """What lies below a run and has that name, while its folders come and go: Path.rglob fails where one goes."""
    found = (Path(folder, name) for folder, names, files in os.walk(path) for name in [*names, *files])
    return [each for each in found if fnmatch.fnmatch(each.name, pattern)]


def published(path: Path) -> dict[str, int]:
    """The inode of every published stage folder."""
    folders = [manifest.parent for manifest in path.rglob("manifest.json")]
    return {
        str(folder.relative_to(path)): folder.stat().st_ino for folder in folders if not folder.name.startswith(".")
    }


def artifacts(path: Path) -> dict[str, bytes]:
    """Every byte of every published stage but timings; of manifests, what does not say how long things took."""
    found = {}
    for folder in published(path):
        for file in sorted((path / folder).rglob("*")):
            name = str(file.relative_to(path))
            if file.name == "manifest.json":
                body = json.loads(file.read_text())
                body["files"].pop("timings.parquet")
                found[name] = json.dumps(body, sort_keys=True).encode()
            elif file.is_file() and file.name != "timings.parquet":
                found[name] = file.read_bytes()
    return found


def containers(path: Path) -> list[str]:
    """Ids of the containers, running or not, that bear the run's label."""
    label = RunDir(path).labels()["flexsink.run"]
    command = ["docker", "ps", "--all", "--quiet", "--filter", f"label=flexsink.run={label}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def assert_same(path: Path, other: Path) -> None:
    ours, theirs = artifacts(path), artifacts(other)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []


JOURNALS = [
    ("evaluations", "completions"),
    ("evaluations", "verdicts"),
    ("iterations/00000", "completions"),
    ("iterations/00000", "verdicts"),
    ("iterations/00001", "completions"),
    ("iterations/00001", "verdicts"),
]


@pytest.mark.timeout(PATIENCE_S * max(KILLS, 2))
def test_a_run_killed_at_random_moments_ends_like_a_quiet_one(
    flow: Flow, quiet_run: tuple[Path, float], tmp_path: Path
) -> None:
    quiet, duration = quiet_run
    resumed_midway = 0
    seed = int(os.environ.get("FLEXSINK_KILL_SEED", time.time_ns() % 10**9))
    print(f"FLEXSINK_KILL_SEED={seed}")
    source = random.Random(seed)
    for number in range(KILLS):
        moment = duration * (number + source.random()) / KILLS
        path = tmp_path / f"run-{number}"
        process = flow.start("train", "tiny_test", "--run-dir", str(path))
        if number % 3 == 2:
            # Journals are open for a small part of the time: every third kill comes while one is being written.
            folder, name = source.choice(JOURNALS)
            journal_at_work(path / folder, process, name=name, lines=source.randint(1, 8))
        else:
            time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not (path / "config.json").exists():
            continue  # killed before there was a run: nothing to resume, and nothing half-written either
        done = published(path)
        journals = []
        for journal in path.rglob("*.journal"):
            # A second name for the file: what the resumed run appends can be read after the stage has removed its own.
            os.link(journal, tmp_path / f"{number}-{len(journals)}.journal")
            journals.append((tmp_path / f"{number}-{len(journals)}.journal", len(journal.read_bytes().splitlines())))
        print(f"killed: {len(done)} stages done, journals of {[lines for _, lines in journals]}")
        flow.resume(path)
        assert_same(path, quiet)
        kept = published(path)
        assert {name: kept[name] for name in done} == done, "a finished stage was made again"
        for journal, _ in journals:
            resumed_midway += 1
            assert repeated(journal) == []
        assert containers(path) == []
        assert not list(path.rglob(".tmp-*"))
        assert not list(path.rglob("*.journal"))
        shutil.rmtree(path)
    print(f"{resumed_midway} journals were gone on with")


@pytest.mark.skipif(KILLS < 20, reason="minutes: FLEXSINK_KILLS=20 asks for it")
@pytest.mark.timeout(4 * 3600)
def test_one_run_killed_in_and_after_every_stage_ends_like_a_quiet_one(
    flow: Flow, quiet_run: tuple[Path, float], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    done: dict[str, int] = {}
    quiet = quiet_run[0]
    stages = sorted(published(quiet), key=lambda name: (quiet / name / "manifest.json").stat().st_mtime_ns)
    assert len(stages) == 10
    for stage in stages:
        for moment in killed_flow.MOMENTS:
            words = ("resume", str(path)) if path.exists() else ("train", "tiny_test", "--run-dir", str(path))
            command = [sys.executable, "-m", "tests.killed_flow", str(path), stage, moment, *words]
            killed = subprocess.run(command, cwd=ROOT, env=flow.environment, capture_output=True, text=True)
            assert killed.returncode == -signal.SIGKILL, (stage, moment, killed.stderr)
            now = published(path)
            assert {name: now[name] for name in done} == done, (stage, moment)
            assert set(now) == set(done) | ({stage} if moment == "published" else set()), (stage, moment)
            done = now
    flow.resume(path)
    assert_same(path, quiet)
    assert containers(path) == []
    assert not [name for name in path.rglob("*") if name.name.startswith(".tmp-") or name.suffix == ".journal"]


def repeated(journal: Path) -> list[str]:
    """Completions or verdicts that a journal holds more than once."""
    records = [json.loads(line.split(" ", 1)[1]) for line in journal.read_text().splitlines()]
    names = Counter(str(record.get("attempt_id") or record["completion_id"]) for record in records)
    return [name for name, count in names.items() if count > 1]


def test_a_kill_and_a_ctrl_c_in_the_middle_of_rollouts_sample_no_finished_completion_again(
    flow: Flow, quiet_run: tuple[Path, float], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    process = flow.start("train", "tiny_test", "--run-dir", str(path))
    first = journal_at_work(path / "iterations/00000", process, name="completions", lines=3)
    assert first is not None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    os.link(first, tmp_path / "first.journal")
    before = first.read_bytes()
    assert 3 <= before.count(b"\n") < 16

    process = flow.start("resume", str(path))
    second = journal_at_work(path / "iterations/00001", process, name="completions", lines=2)
    assert second is not None
    os.link(second, tmp_path / "second.journal")
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (130, f"interrupted; go on with: flexsink resume {path}\n")
    assert containers(path) == []

    flow.resume(path)
    after = (tmp_path / "first.journal").read_bytes()
    assert after.startswith(before[: before.rindex(b"\n") + 1])
    for name in ("first.journal", "second.journal"):
        assert (tmp_path / name).read_bytes().count(b"\n") == 16
        assert repeated(tmp_path / name) == []
    assert_same(path, quiet_run[0])


def journal_at_work(folder: Path, process: "subprocess.Popen[str]", *, name: str, lines: int) -> Path | None:
    """The journal of a stage at work in `folder` once it has that many lines; None when the flow ended without it."""
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        for journal in folder.glob(f".tmp-*/{name}.journal"):
            with contextlib.suppress(FileNotFoundError):  # published between the two looks
                if journal.read_bytes().count(b"\n") >= lines:
                    return journal
        time.sleep(0.002)
    return None


def test_flipped_bits_and_a_deleted_file_run_their_stages_and_no_other(flow: Flow, copied: Path) -> None:
    before, everything = published(copied), artifacts(copied)
    for name in ("iterations/00000/rollout/rollouts-00000.parquet", "iterations/00001/update/optimizer.safetensors"):
        body = bytearray((copied / name).read_bytes())
        body[len(body) // 2] ^= 1
        (copied / name).write_bytes(body)
    (copied / "iterations/00001/score/scores-00000.parquet").unlink()
    flow.resume(copied)
    assert artifacts(copied) == everything
    after = published(copied)
    assert {folder for folder in before if after[folder] != before[folder]} == {
        "iterations/00000/rollout",
        "iterations/00001/score",
        "iterations/00001/update",
    }
    assert containers(copied) == []


def flipped(checkpoint: Path) -> None:
    body = bytearray((checkpoint / "model.safetensors").read_bytes())
    body[10] ^= 255
    (checkpoint / "model.safetensors").write_bytes(body)


def of_another_architecture(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (checkpoint / "config.json").write_text(json.dumps(config))


def without_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()


@pytest.mark.parametrize("spoil", [flipped, of_another_architecture, without_weights])
def test_a_bad_checkpoint_is_one_line_and_leaves_no_run(flow: Flow, tmp_path: Path, spoil: Any) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(ROOT / "data/tiny", checkpoint)
    spoil(checkpoint)
    path = tmp_path / "run"
    code, _, errors = flow.run("train", "tiny_test", f"model.source={checkpoint}", "--run-dir", str(path))
    assert code == 2
    assert [line.split(":")[0] for line in errors.splitlines()] == ["error", "hint"], errors
    assert not path.exists()
