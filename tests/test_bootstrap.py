"""containers/bootstrap.sh: what it refuses and how; a repeat skips what is done; the lock fits pyproject.toml."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[1]
LOCKS = ("requirements.lock", "requirements-test.lock")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like a clone in which everything but Docker is set up."""
    shutil.copytree(ROOT / "containers", tmp_path / "containers")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"VIRTUAL_ENV={tmp_path.resolve()}/.venv\n")
    mark_installed(tmp_path, "requirements.lock")
    return tmp_path


def mark_installed(folder: Path, *locks: str) -> None:
    """Writes what bootstrap.sh does when it has installed these there."""
    names = (*(f"containers/{name}" for name in locks), "pyproject.toml")
    text = b"".join((folder / name).read_bytes() for name in names)
    text += f"{folder.resolve()}\n{sys.version_info[0]} {sys.version_info[1]}\n".encode()
    (folder / ".venv" / "flexsink-installed").write_text(hashlib.sha256(text).hexdigest() + "\n")


def bootstrap(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(folder / "containers" / "bootstrap.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, **environment},
    )


def test_an_unknown_word_is_refused_with_what_may_be_said() -> None:
    done = bootstrap(ROOT, "tarin")
    assert done.returncode == 2
    assert done.stderr == "error: bootstrap.sh tarin\nhint: give nothing, train PRESET or test\n"


def test_an_old_python_is_refused_with_its_version(tmp_path: Path, clone: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (old / name).write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit\nexit 1\n')
        (old / name).chmod(0o755)
    done = bootstrap(clone, PATH=f"{old}:/usr/bin:/bin")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Python 3.11, 3.12 or 3.13 (python3 is Python 3.9.2)\nhint: ")


def test_a_python_that_is_named_and_wrong_is_refused() -> None:
    done = bootstrap(ROOT, PYTHON="/bin/false")
    assert done.returncode == 2
    assert "PYTHON=/bin/false is no Python 3.11, 3.12 or 3.13" in done.stderr


def test_a_named_daemon_that_does_not_answer_is_refused_before_anything_is_installed(clone: Path) -> None:
    (clone / ".venv" / "flexsink-installed").unlink()
    done = bootstrap(clone, DOCKER_HOST="unix:///nowhere/docker.sock")
    assert done.returncode == 2
    assert "no Docker daemon answers at DOCKER_HOST=unix:///nowhere/docker.sock" in done.stderr
    assert "installing" not in done.stdout


@pytest.mark.docker
@pytest.mark.timed
def test_a_repeat_installs_and_builds_nothing_and_is_quick(clone: Path) -> None:
    times = []
    for _ in range(3):
        start = time.monotonic()
        done = bootstrap(clone)
        times.append(time.monotonic() - start)
        assert done.returncode == 0, done.stderr
        assert "installing" not in done.stdout
        assert re.search(r"sandbox image flexsink-sandbox:[0-9a-f]{16} is there", done.stdout)
        assert re.search(r"^install [0-9.]+ s, build [0-9.]+ s, run [0-9.]+ s$", done.stdout, re.MULTILINE)
    assert min(times) < 2 * 2.0  # the bar is 2 s


@pytest.mark.docker
def test_a_changed_lock_is_installed_again(clone: Path) -> None:
    with (clone / "containers" / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    (clone / ".venv" / "bin" / "python").write_text(
        f'#!/bin/sh\n[ "$2" = pip ] && {{ echo "pip: $*"; exit 0; }}\nexec "{sys.executable}" "$@"\n'
    )
    first, second = bootstrap(clone), bootstrap(clone)
    assert first.returncode == second.returncode == 0, first.stderr
    assert "-rcontainers/requirements.lock" in first.stdout
    assert "--no-deps" in first.stdout
    assert "pip:" not in second.stdout


@pytest.mark.parametrize("what", ["renamed", "python gone", "python replaced", "deleted"])
def test_an_environment_that_cannot_work_any_more_is_made_anew_once(clone: Path, what: str) -> None:
    folder = clone.parent / f"{clone.name}-renamed" if what == "renamed" else clone
    made = clone.parent / f"{clone.name}-made"
    made.touch()
    installed = f'[ "$2" = pip ] && {{ echo "pip: $*" >> {made}; exit 0; }}\nexec "{sys.executable}" "$@"\n'
    # A Python that makes an environment of what the test needs of one.
    python = clone.parent / f"{clone.name}-python"
    python.write_text(
        f"""#!/bin/sh
[ "$2" = venv ] || exec "{sys.executable}" "$@"
echo venv >> {made}
mkdir -p .venv/bin
printf '#!/bin/sh\\n%s' '{installed}' > .venv/bin/python
printf '#!/bin/sh\\n' > .venv/bin/flexsink
echo "VIRTUAL_ENV=$PWD/.venv" > .venv/bin/activate
chmod +x .venv/bin/python .venv/bin/flexsink
"""
    )
    python.chmod(0o755)
    inside = clone / ".venv/bin/python"
    (clone / ".venv/bin/flexsink").symlink_to("/bin/true")
    local = ("train", "tiny", "sandbox.backend=local")
    assert bootstrap(clone, *local, PYTHON=str(python)).returncode == 0
    assert made.read_text() == ""
    match what:
        case "renamed":
            clone.rename(folder)
        case "python gone":
            inside.unlink()
        case "python replaced":  # by one that looks for packages elsewhere
            minor = 12 if sys.version_info[1] == 11 else 11
            newer = f"import sys; sys.version_info = (3, {minor}); sys.modules['pip'] = None; "
            inside.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{newer}$2"\n')
        case "deleted":
            shutil.rmtree(clone / ".venv")
    try:
        done = bootstrap(folder, *local, PYTHON=str(python))
        assert done.returncode == 0, done.stderr
        assert [line.split()[0] for line in made.read_text().splitlines()] == ["venv", "pip:", "pip:"]
        assert bootstrap(folder, *local, PYTHON=str(python)).returncode == 0
        assert made.read_text().count("\n") == 3
    finally:
        if what == "renamed":
            shutil.rmtree(folder)


def test_with_the_local_sandbox_no_docker_is_looked_for(clone: Path) -> None:
    flexsink = clone / ".venv" / "bin" / "flexsink"
    flexsink.write_text('#!/bin/sh\necho "flexsink $*"\n')
    flexsink.chmod(0o755)
    words = ("train", "tiny", "sandbox.backend=local", "train.seed=1")
    done = bootstrap(clone, *words, DOCKER_HOST="unix:///nowhere/docker.sock")
    assert done.returncode == 0, done.stderr
    assert f"flexsink {' '.join(words)}\n" in done.stdout
    assert "sandbox image" not in done.stdout


@pytest.mark.docker
def test_a_failing_run_gives_its_exit_status_and_the_times(clone: Path) -> None:
    flexsink = clone / ".venv" / "bin" / "flexsink"
    flexsink.write_text('#!/bin/sh\necho "flexsink $*"\nexit 7\n')
    flexsink.chmod(0o755)
    done = bootstrap(clone, "train", "tiny", "train.iterations=2")
    assert done.returncode == 7
    assert "flexsink train tiny train.iterations=2\n" in done.stdout
    assert "install " in done.stdout


@pytest.mark.docker
@pytest.mark.parametrize(("second", "status"), [(0, 0), (1, 1)])
def test_what_misses_its_time_is_measured_once_more(clone: Path, second: int, status: int) -> None:
    for name in ("ruff", "mypy", "lint-imports"):
        (clone / ".venv" / "bin" / name).symlink_to("/bin/true")
    (clone / ".venv" / "bin" / "python").write_text(
        f'''#!/bin/sh
case "$*" in
    "-m pytest -m timed --last-failed tests") exit {second} ;;
    "-m pytest -m timed tests") exit 1 ;;
    "-m pytest"*) exit 0 ;;
esac
exec "{sys.executable}" "$@"
'''
    )
    mark_installed(clone, *LOCKS)
    done = bootstrap(clone, "test", "tests")
    assert done.returncode == status, done.stderr
    assert ("failed: measured tests" in done.stderr) == bool(status)


@pytest.mark.parametrize("python_version", ["3.11", "3.12"])
def test_the_locked_versions_satisfy_the_project(python_version: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {}
    for name in LOCKS:
        for line in (ROOT / "containers" / name).read_text().splitlines():
            if line and not line.startswith("#"):
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate({"python_version": python_version}):
                    (pin,) = requirement.specifier
                    assert pin.operator == "=="
                    assert "+" not in pin.version, f"{line}: a local version tag binds the lock to one index"
                    locked[requirement.name] = pin.version
    for line in project["dependencies"] + project["optional-dependencies"]["test"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(locked[requirement.name]), line
    assert locked["torch"] == "2.13.0"
    assert locked["prefect"] == "3.8.8"


def test_no_script_names_a_host() -> None:
    for name in ("bootstrap.sh", "base.sh", *LOCKS, "sandbox/Dockerfile"):
        assert "://" not in (ROOT / "containers" / name).read_text().replace("unix://", ""), name


def test_the_pre_commit_hooks_are_the_checks_of_the_test_command() -> None:
    script = (ROOT / "containers" / "bootstrap.sh").read_text()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for check, hook in (("ruff check", "ruff check"), ("ruff format --check", "ruff format --check"), ("mypy", "mypy")):
        assert check in script
        assert f".venv/bin/{hook}" in hooks
    assert "lint-imports" in script
    assert ".venv/bin/lint-imports" in hooks
