"""The edges of every command: files out of reach, a reader that leaves, hints that a shell takes as they are."""

import errno
import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import cli, server
from stages.artifacts import RunDir
from stages.artifacts.run import explained
from stages.config import RunConfig, UserError
from stages.exits import guarded

ROOT = Path(__file__).parent.parent
NOBODY = 65534


@pytest.fixture
def another_user() -> Iterator[None]:
    if os.geteuid():
        pytest.skip("only root can become another user")
    for module in ("flows.plan", "flows.summary", "stages.report.page", "stages.runs.show"):
        importlib.import_module(module)  # while Python's own files can be read
    os.seteuid(NOBODY)
    yield
    os.seteuid(0)


@pytest.fixture
def hidden(tmp_path: Path) -> Path:
    """A run in a folder of root's."""
    run = RunDir.create(tmp_path / "mine/run", RunConfig())
    for path in (tmp_path, *list(tmp_path.parents)[:2]):
        path.chmod(0o755)
    (tmp_path / "mine").chmod(0o700)
    return run.path


@pytest.mark.parametrize("command", ["inspect", "plan", "report", "resume", "evaluate"])
def test_a_run_of_another_user_is_one_line(
    hidden: Path, another_user: None, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    code = guarded(lambda: cli.dispatch([command, str(hidden)]))
    error, hint = capsys.readouterr().err.splitlines()
    assert (code, error.removesuffix("/config.json")) == (2, f"error: no permission to read or write {hidden}")
    assert hint.startswith("hint: change its owner or its mode")


def test_a_name_too_long_for_the_disk_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flows.steps.check_sandbox", lambda backend: None)
    for words in (["train", "tiny", "--run-dir", "x" * 300], ["inspect", "x" * 300]):
        assert guarded(lambda words=words: cli.dispatch(words)) == 2  # type: ignore[misc]
        error, hint = capsys.readouterr().err.splitlines()
        assert error.startswith("error: too long a name: xxx")
        assert len(error) < 160
        assert hint == "hint: choose a shorter one"


@pytest.mark.parametrize("lines", [10, 100_000])
def test_a_reader_that_leaves_ends_the_command_without_a_word(lines: int) -> None:
    code = f"""
import sys
from stages.exits import guarded
def action():
    input()
    for _ in range({lines}):
        print("a line")
    return 0
sys.exit(guarded(action))
"""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 141)
    process.stderr.close()


def test_a_pipe_that_breaks_elsewhere_keeps_its_traceback() -> None:
    def action() -> int:
        raise BrokenPipeError(errno.EPIPE, "a socket")

    with pytest.raises(BrokenPipeError):
        guarded(action)


def refused(number: int, name: Path, folder: Path, *hint: str) -> tuple[str, str]:
    with pytest.raises(UserError) as raised, explained(folder, *hint):
        raise OSError(number, os.strerror(number), str(name))
    return raised.value.message, raised.value.hint


def test_the_hint_fits_the_file_that_is_at_fault() -> None:
    run, model = Path("/runs/a"), Path("/models/b/model.safetensors")
    other = "choose another folder with --run-dir"
    assert refused(errno.EACCES, run / "load", run)[1] == f"change its owner or its mode, or {other}"
    assert refused(errno.EACCES, run.parent, run)[1] == f"change its owner or its mode, or {other}"
    assert refused(errno.EACCES, model, run) == (
        f"no permission to read or write {model}",
        "change its owner or its mode",
    )
    assert refused(errno.EROFS, run, run)[1] == other
    assert refused(errno.EROFS, run, run, "set A_VARIABLE")[1] == "set A_VARIABLE"


def test_a_folder_that_no_server_can_be_kept_in_has_a_hint_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").write_text("not a folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for name in ("no_proxy", "NO_PROXY", "PREFECT_HOME", *server.QUIET):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    with pytest.raises(UserError) as raised:
        server.connect(print)
    assert "PREFECT_API_URL" in raised.value.hint
    assert "--run-dir" not in raised.value.hint


def test_a_hint_is_a_command_that_the_shell_takes(tmp_path: Path) -> None:
    path = tmp_path / "my runs" / "it's a"
    RunDir.create(path, RunConfig())
    with pytest.raises(UserError) as raised:
        RunDir.create(path, RunConfig())
    command = raised.value.hint.partition(": ")[2]
    assert shlex.split(command) == ["flexsink", "resume", str(path)]
