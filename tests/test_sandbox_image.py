"""The sandbox image: what its name depends on, and what is said when it cannot be made."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import stages.sandbox.image as image
from stages.config import UserError
from tests.patience import PATIENCE_S

docker = pytest.importorskip("docker")


class NoRegistry:
    """A Docker client whose daemon has no image and reaches no registry."""

    def inspect_image(self, name: str) -> Any:
        raise docker.errors.ImageNotFound(name)

    def pull(self, *name: str, **options: Any) -> Any:
        raise docker.errors.APIError("no such host")


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "sandbox"
    shutil.copytree(image.FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(image, "FOLDER", folder)
    return folder


def test_the_name_follows_the_files_and_their_names(copied: Path) -> None:
    before = image.image_name()
    assert image.image_name() == before
    (copied / "supervisor.py").write_text((copied / "supervisor.py").read_text() + "\n")
    changed = image.image_name()
    (copied / "case.py").rename(copied / "cases.py")
    assert len({before, changed, image.image_name()}) == 3


def test_compiled_files_do_not_change_the_name(copied: Path) -> None:
    before = image.image_name()
    (copied / "__pycache__").mkdir()
    (copied / "__pycache__" / "case.cpython-311.pyc").write_bytes(b"x")
    assert image.image_name() == before


def test_without_a_registry_and_without_debian_packages_the_error_says_what_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="cannot be pulled: no such host") as raised:
        image.obtain_base(NoRegistry())
    assert "--base" in raised.value.hint


def test_a_base_script_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "base.sh"
    script.write_text("echo one >&2; echo 'error: no packages' >&2; exit 3\n")
    monkeypatch.setattr(image, "BASE_SCRIPT", script)
    with pytest.raises(UserError, match="could be made of Debian packages: error: no packages"):
        image.make_base(NoRegistry())


@pytest.mark.docker
def test_a_build_that_fails_names_the_step_and_leaves_no_image(copied: Path) -> None:
    client = image.connect()
    (copied / "bpf.py").write_text("raise SystemExit('no filter today')\n")
    base = next(name for name in (image.BASE, *local_bases(client)) if image.has_image(client, name))
    with pytest.raises(UserError, match="does not build"):
        image.build(client, base)
    assert not image.has_image(client, image.image_name())


@pytest.mark.docker
def test_the_image_has_no_shell_when_its_base_is_made_here() -> None:
    client = image.connect()
    if image.has_image(client, image.BASE):
        pytest.skip(f"the daemon has {image.BASE}")
    created = client.create_container(image.require_image(client), entrypoint=["/bin/sh", "-c", "true"])
    try:
        with pytest.raises(docker.errors.APIError, match="no such file"):
            client.start(created["Id"])
    finally:
        client.remove_container(created["Id"], force=True)


def test_the_command_says_in_one_line_that_no_daemon_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(image.__file__).parents[2]
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    command = [sys.executable, "-m", "stages.sandbox", "image"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 2
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]


def local_bases(client: Any) -> list[str]:
    return [name for entry in client.images(name=image.LOCAL_BASE) for name in entry["RepoTags"] or ()]
