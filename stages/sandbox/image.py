"""The sandbox image: its name, whether it is there, and how it is made.

    python -m stages.sandbox image [--base IMAGE]

The tag is the digest of containers/sandbox: a changed file is another image. The base is python:3.12-slim when the
daemon has it or can pull it, else the file system that containers/base.sh wrote.
"""

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from stages.config import UserError

REPOSITORY = "flexsink-sandbox"
BASE = "python:3.12-slim"
LOCAL_BASE = "flexsink-base"
CONTAINERS = Path(__file__).parents[2] / "containers"
FOLDER = CONTAINERS / "sandbox"
BASE_SCRIPT = CONTAINERS / "base.sh"
BOOTSTRAP_HINT = "run: bash containers/bootstrap.sh"


def source_digest() -> str:
    """Returns 16 hex digits over the names and contents of the image's files."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.iterdir()):
        if path.is_file():
            digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def image_name() -> str:
    """Returns the image that belongs to the files as they are now."""
    return f"{REPOSITORY}:{source_digest()}"


def connect(**options: Any) -> Any:
    """Returns a docker.APIClient that has answered; UserError when no daemon does."""
    import docker

    try:
        client = docker.APIClient(**{**docker.utils.kwargs_from_env(), **options})
        client.ping()
    except (docker.errors.DockerException, OSError) as error:
        raise UserError(
            f"no Docker daemon answers: {str(error).splitlines()[0][:200]}",
            f"start Docker, or {BOOTSTRAP_HINT} as root; as another user you need to be in the group docker; "
            "without Docker, sandbox.backend=local may work: flexsink doctor says so",
        ) from error
    return client


def has_image(client: Any, name: str) -> bool:
    """Says whether the daemon has the image."""
    import docker

    try:
        client.inspect_image(name)
    except docker.errors.ImageNotFound:
        return False
    return True


def require_image(client: Any) -> str:
    """Returns the image's name; UserError when it has not been built."""
    name = image_name()
    if not has_image(client, name):
        raise UserError(f"the sandbox image {name} is missing", BOOTSTRAP_HINT)
    return name


def obtain_base(client: Any, wanted: str = BASE, *, purpose: str = "sandbox") -> str:
    """Returns the name of a base that the daemon has now: found, pulled, or made of this machine's Debian packages.

    purpose: what containers/base.sh puts into one that is made here.
    """
    import docker

    if has_image(client, wanted):
        return wanted
    try:
        for event in client.pull(*wanted.split(":"), stream=True, decode=True):
            if "error" in event:
                raise docker.errors.DockerException(event["error"])
        return wanted
    except (docker.errors.DockerException, OSError) as error:
        reason = str(error).splitlines()[0][:200]
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise UserError(
            f"the base image {wanted} cannot be pulled: {reason}",
            "make a registry reachable, or load an image that has Python 3.11 or newer and name it with --base",
        )
    return make_base(client, purpose=purpose)


def make_base(client: Any, *, purpose: str = "sandbox") -> str:
    """Makes the base from Debian packages and returns its name; UserError when that fails."""
    import docker

    tag = hashlib.sha256(BASE_SCRIPT.read_bytes()).hexdigest()[:16]
    if purpose != "sandbox":
        tag = f"{purpose}-{tag}"
    if has_image(client, f"{LOCAL_BASE}:{tag}"):
        return f"{LOCAL_BASE}:{tag}"
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "base.tar"
        done = subprocess.run(["bash", str(BASE_SCRIPT), str(tar), purpose], capture_output=True, text=True)
        if done.returncode:
            words = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise UserError(
                f"no base image could be made of Debian packages: {' '.join(words)}",
                f"try: bash {BASE_SCRIPT} base.tar",
            )
        try:
            client.import_image_from_file(str(tar), repository=LOCAL_BASE, tag=tag)
        except docker.errors.DockerException as error:
            raise UserError(f"Docker does not take the base image: {error}", "look at the daemon's log") from error
    return f"{LOCAL_BASE}:{tag}"


def build(client: Any, base: str) -> str:
    """Builds the image on `base` and returns its name; UserError with the build's last lines when it fails."""
    import docker

    name = image_name()
    lines: list[str] = []
    try:
        for event in client.build(
            path=str(FOLDER),
            tag=name,
            buildargs={"BASE": base},
            rm=True,
            forcerm=True,
            network_mode="none",
            decode=True,
        ):
            lines.append(str(event.get("stream") or event.get("error") or "").strip())
            if "error" in event:
                raise UserError(
                    "the sandbox image does not build: " + " | ".join(lines[-3:]), f"base {base}, files {FOLDER}"
                )
    except docker.errors.APIError as error:
        raise UserError(
            f"the sandbox image does not build: {error.explanation}", f"base {base}, files {FOLDER}"
        ) from error
    return name
