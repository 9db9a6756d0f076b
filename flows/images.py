"""The images that stages run in: `flexsink-gpu` for load, rollout, update, evaluate and export, `flexsink-score`
without torch for score and report.

    python -m flows.images [--check] [--pip] [--base IMAGE] [gpu|score ...]

Each is two: one with packages, made again when a package changes, and one with the project's code on top
(containers/stages), made again within seconds when that changes. Tags are digests of what is inside. Docker works
without a network and without BuildKit. The packages are those of this environment where the base's Python is of the
same minor version; else, and with --pip, pip gets the locked versions, here and not in a build, with its own settings:
a private certificate authority (PIP_CERT), an index (PIP_INDEX_URL), a folder of wheels (PIP_FIND_LINKS, PIP_NO_INDEX).
No secret of theirs ends up in an image.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution, entry_points
from pathlib import Path
from typing import Any, NamedTuple

from stages.artifacts.manifest import TASKS
from stages.artifacts.run import locked
from stages.config import UserError
from stages.sandbox.image import BASE_SCRIPT, CONTAINERS, connect, has_image, obtain_base
from stages.tasks import registry

ROOT = CONTAINERS.parent
FOLDER = CONTAINERS / "stages"
LOCK = CONTAINERS / "requirements.lock"
BUILD_TIMEOUT_S = 1800
CODE = ("stages", "containers/sandbox")
PACKAGES = "opt/flexsink/packages"
ENVIRONMENT = {"PYTHONPATH": f"/opt/flexsink/code:/{PACKAGES}", "PYTHONUNBUFFERED": "1"}
BUFFER_BYTES = 1 << 20
DAEMON_HINT = "look at the daemon's log, and at the space on its disk"
Note = Callable[[str], None]


class Kind(NamedTuple):
    """An image's distributions, without those that they need, and the modules that its build imports."""

    roots: tuple[str, ...]
    packages: tuple[str, ...]
    stages: tuple[str, ...]


KINDS = {
    "gpu": Kind(
        ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "pyarrow", "filelock"),
        ("torch", "transformers.models.gpt_oss.modeling_gpt_oss", "peft", "bitsandbytes", "pyarrow.parquet"),
        ("stages.load", "stages.rollout", "stages.update", "stages.evaluate", "stages.export", "stages.worker"),
    ),
    "score": Kind(
        ("pyarrow", "filelock", "rich"),
        ("pyarrow.parquet", "rich.table"),
        ("stages.score", "stages.report", "stages.runs", "stages.worker"),
    ),
}


def version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def plain(name: str) -> str:
    """A distribution's name as all its spellings are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(roots: Sequence[str], *, but: Iterable[str] = ()) -> list[Distribution]:
    """The installed distributions of these names and all that they need, in name order; UserError for one not here.

    but: names that are left out, with what only they need.
    """
    from packaging.requirements import Requirement

    found: dict[str, Distribution] = {}
    todo = list(roots)
    while todo:
        name = plain(todo.pop())
        if name in found or name in but:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            hint = "delete .venv, then: bash containers/bootstrap.sh"
            raise UserError(f"package {name} is not installed, and stages need it", hint) from None
        for line in found[name].requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                todo.append(needed.name)
    return [found[name] for name in sorted(found)]


def packages_name(kind: str) -> str:
    """The image that holds the packages as they are installed here."""
    digest = hashlib.sha256(f"{kind} {version()} {os.uname().machine}\n".encode())
    for each in closure(KINDS[kind].roots):
        digest.update(f"{plain(each.name)}=={each.version}\n".encode())
    digest.update(BASE_SCRIPT.read_bytes())
    return f"flexsink-{kind}-packages:{digest.hexdigest()[:16]}"


def image_name(kind: str, task: str = "") -> str:
    """The image that belongs to packages and code as they are now, those of a task that is not ours among them."""
    digest = hashlib.sha256(packages_name(kind).encode())
    digest.update((FOLDER / "Dockerfile").read_bytes())
    for path in code():
        digest.update(f"{path}\0{hashlib.sha256((ROOT / path).read_bytes()).hexdigest()}\n".encode())
    for name, body in sorted(brought(task, kind).items()):
        digest.update(f"{name}\0{hashlib.sha256(body).hexdigest()}\n".encode())
    return f"flexsink-{kind}:{digest.hexdigest()[:16]}"


def code() -> list[Path]:
    """The project's files that stages need, relative to its folder, in order."""
    paths = (path for name in CODE for path in (ROOT / name).rglob("*"))
    return sorted(path.relative_to(ROOT) for path in paths if path.is_file() and "__pycache__" not in path.parts)


def brought(task: str, kind: str) -> dict[str, bytes]:
    """The files, by their place among the code, of the distribution that brings this task and of what it needs beside
    the project and an image's packages. Its module is taken from where it is imported: it may be installed editably.
    """
    points = [point for point in entry_points(group=TASKS, name=task) if point.dist] if task else []
    if not points or task in registry.TASKS:
        return {}
    point, files = points[0], dict[str, bytes]()
    assert point.dist is not None
    top = point.module.partition(".")[0]
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        raise UserError(
            f"task {task!r} is in {point.module}, which cannot be imported", f"try: python -c 'import {top}'"
        )
    module = Path(spec.origin)
    folder = module.parent if spec.submodule_search_locations else None
    for path in files_of(folder) if folder else [module]:
        if "__pycache__" not in path.parts:
            files[str(path.relative_to(folder.parent) if folder else path.name)] = path.read_bytes()
    for name in ("METADATA", "entry_points.txt"):
        about = f"{plain(point.dist.name).replace('-', '_')}-{point.dist.version}.dist-info"
        files[f"{about}/{name}"] = (point.dist.read_text(name) or "").encode()
    there = {plain(each.name) for each in closure(KINDS[kind].roots)}
    for each in closure([point.dist.name], but={"flexsink", *there}):
        if plain(each.name) != plain(point.dist.name):
            for file, path in installed(each):
                files[file] = path.read_bytes()
    return files


def require(client: Any, kind: str, note: Note, *, task: str = "", pip: bool = False, base: str = "") -> str:
    """The name of the image of that kind, built where the daemon lacks it; UserError when that fails.

    task: the run's, whose distribution's files are added where it is none of ours.
    """
    name = image_name(kind, task)
    if has_image(client, name):
        return name
    with locked(Path(tempfile.gettempdir(), f"flexsink-images-{os.getuid()}.lock"), "", wait=True):
        return name if has_image(client, name) else make(name, kind, note, task=task, pip=pip, base=base)


def make(name: str, kind: str, note: Note, *, task: str, pip: bool, base: str) -> str:
    """Makes the image of that name, and where it is missing the one with its packages; returns the name."""
    builder = connect(timeout=BUILD_TIMEOUT_S)
    try:
        packages = packages_name(kind)
        if not has_image(builder, packages):
            make_packages(builder, kind, packages, note, pip=pip, base=base)
        note(f"building the image {name}")
        with pipe_of(lambda tar: add_code(tar, brought(task, kind))) as context:
            build(builder, name, context, PACKAGES=packages, IMPORTS=" ".join(KINDS[kind].stages))
    finally:
        builder.close()
    return name


def make_packages(client: Any, kind: str, name: str, note: Note, *, pip: bool, base: str) -> None:
    """Makes the image that holds the packages: a base's files and theirs, in one stream.

    A build would write the gigabyte three times: as context, as layer and as the layer's archive. An import writes it
    once, which takes a third of the time.
    """
    import docker

    distributions = closure(KINDS[kind].roots)
    # Triton compiles a little C on first use, and looks for a compiler, for Python's headers and for libc's.
    compiler = any(plain(each.name) == "triton" for each in distributions)
    wanted = f"python:{version()}" if compiler else f"python:{version()}-slim"
    base = base or obtain_base(client, wanted, purpose="compiler" if compiler else "stage")
    there = python_of(client, base)
    with contextlib.ExitStack() as stack:
        folder: Path | None = None
        if pip or there != version():
            note(f"getting the packages of {name} with pip")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            install(folder, [plain(each.name) for each in distributions], python=there)
        note(f"making the image {name}: this takes a minute, and is not needed again until a package changes")
        if there == version():
            compile_imported(KINDS[kind].packages, folder)

        def fill(tar: tarfile.TarFile) -> None:
            add_image(tar, client, base)
            if folder is not None:
                add_files(tar, folder, [path.relative_to(folder) for path in files_of(folder)], PACKAGES)
            else:
                for each in distributions:
                    add_distribution(tar, each)

        settings = {**environment_of(client, base), **ENVIRONMENT}
        changes = [f'ENV {key}="{value}"' for key, value in settings.items()]
        repository, _, tag = name.partition(":")
        with pipe_of(fill) as stream:
            try:
                client.import_image_from_stream(stream, repository=repository, tag=tag, changes=changes)
            except (docker.errors.DockerException, OSError) as error:
                raise UserError(f"Docker does not take the image {name}: {str(error)[:300]}", DAEMON_HINT) from error


def compile_imported(modules: Sequence[str], folder: Path | None) -> None:
    """Has Python compile what importing these takes, so that it is compiled in the image; it is only slower without."""
    path = {"PYTHONPATH": str(folder)} if folder is not None else {}
    subprocess.run([sys.executable, "-c", f"import {', '.join(modules)}"], env=os.environ | path, capture_output=True)


def environment_of(client: Any, image: str) -> dict[str, str]:
    variables: list[str] = client.inspect_image(image)["Config"].get("Env") or []
    return dict(each.split("=", 1) for each in variables)


def add_image(tar: tarfile.TarFile, client: Any, image: str) -> None:
    """Adds the files of an image."""
    container = client.create_container(image, entrypoint=["none"])["Id"]
    try:
        with tarfile.open(fileobj=Chunks(client.export(container)), mode="r|", bufsize=BUFFER_BYTES) as files:
            for entry in files:
                tar.addfile(entry, files.extractfile(entry) if entry.isreg() else None)
    finally:
        client.remove_container(container, force=True)


class Chunks(io.RawIOBase):
    """A stream to read of parts that come one by one."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        self.parts = iter(parts)
        self.rest = b""

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self.rest) < size:
            part = next(self.parts, None)
            if part is None:
                break
            self.rest += part
        size = len(self.rest) if size < 0 else size
        data, self.rest = self.rest[:size], self.rest[size:]
        return data


def python_of(client: Any, image: str) -> str:
    """The minor version of the Python in an image, such as 3.11; UserError where there is none."""
    import docker

    program = "import sys; print(*sys.version_info[:2], sep='.')"
    container = ""
    try:
        created = client.create_container(image, entrypoint=["python3", "-c", program], network_disabled=True)
        container = created["Id"]
        client.start(container)
        client.wait(container)
        words: str = client.logs(container).decode().strip()
    except docker.errors.DockerException as error:
        raise UserError(f"the base image {image} does not run python3: {error}", "name another with --base") from error
    finally:
        if container:
            client.remove_container(container, force=True)
    return words


def install(folder: Path, names: Sequence[str], *, python: str) -> None:
    """Has pip put the locked versions of these distributions into `folder`, for that Python; UserError with its words.

    pip's settings are this process's environment and its configuration files.
    """
    command = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--no-compile", "--target", str(folder)]
    if python != version():
        command += ["--python-version", python, "--only-binary", ":all:"]
    done = subprocess.run([*command, *pinned(names, python=python)], capture_output=True, text=True)
    if done.returncode:
        lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
        # Why an index was not read, a certificate that nobody vouches for, say, is not an error of pip's.
        reasons = [line for line in lines if "Could not fetch" in line] + [each for each in lines if "ERROR" in each]
        words = (reasons or lines or ["it ended without a word"])[0].removeprefix("ERROR: ").strip()[:400]
        raise UserError(
            f"pip could not get the packages for stages: {words}",
            "pip takes an index, a certificate authority or a folder of wheels from PIP_INDEX_URL, PIP_CERT, "
            "PIP_FIND_LINKS, PIP_NO_INDEX",
        )


def pinned(names: Sequence[str], *, python: str) -> list[str]:
    """The lines of the lock for these distributions on that Python, their conditions left out."""
    from packaging.requirements import Requirement

    lines = []
    for line in LOCK.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if plain(requirement.name) in names and (
            requirement.marker is None or requirement.marker.evaluate({"python_version": python})
        ):
            lines.append(f"{requirement.name}{requirement.specifier}")
    return lines


def add_code(tar: tarfile.TarFile, more: Mapping[str, bytes]) -> None:
    """Adds what the Dockerfile builds with: the project's code, and other files beside it."""
    tar.add(FOLDER / "Dockerfile", "Dockerfile", filter=owned_by_root)
    add_files(tar, ROOT, code(), "code")
    for name, body in more.items():
        entry = tarfile.TarInfo(f"code/{name}")
        entry.size = len(body)
        tar.addfile(entry, io.BytesIO(body))


def files_of(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def add_distribution(tar: tarfile.TarFile, each: Distribution) -> None:
    """Adds what a distribution installed among the packages, and what of it Python has compiled since."""
    present = set()
    for name, path in installed(each):
        tar.add(path, f"{PACKAGES}/{name}", filter=owned_by_root)
        present.add(name)
    for name, path in installed(each):
        compiled = Path(importlib.util.cache_from_source(str(path))) if name.endswith(".py") else path
        place = f"{os.path.dirname(name)}/__pycache__/{compiled.name}".lstrip("/")
        if compiled != path and place not in present and compiled.is_file():
            tar.add(compiled, f"{PACKAGES}/{place}", filter=owned_by_root)


def installed(each: Distribution) -> Iterator[tuple[str, Path]]:
    """The files of a distribution that lie among the packages: where there, and where on this machine."""
    if each.files is None:
        hint = "install it with pip, or build the images with: python -m flows.images --pip"
        raise UserError(f"package {each.name} does not say which files it has", hint)
    for file in sorted({str(file) for file in each.files if ".." not in file.parts}):
        path = Path(str(each.locate_file(file)))
        if path.is_file():
            yield file, path


def add_files(tar: tarfile.TarFile, root: Path, names: Iterable[Path], below: str) -> None:
    for name in names:
        tar.add(root / name, f"{below}/{name}", filter=owned_by_root)


def owned_by_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """An entry that every user may read: the container's is the caller's, whoever that is."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode |= 0o444 | (0o111 if entry.isdir() else 0)
    return entry


@contextlib.contextmanager
def pipe_of(fill: Callable[[tarfile.TarFile], None]) -> Iterator[Any]:
    """An archive to read while a thread writes it: it may be a gigabyte, and is on no disk."""
    reading, writing = os.pipe()
    errors: list[Exception] = []

    def write() -> None:
        try:
            with (
                open(writing, "wb") as end,
                tarfile.open(fileobj=end, mode="w|", bufsize=BUFFER_BYTES) as tar,
            ):
                tar.copybufsize = BUFFER_BYTES  # type: ignore[attr-defined]
                fill(tar)
        except Exception as error:  # a file that is gone, a reader that has given up: told by whoever builds
            errors.append(error)

    thread = threading.Thread(target=write, name="archive")
    thread.start()
    try:
        with open(reading, "rb") as end:
            yield end
    finally:
        thread.join()
        for error in errors:
            if not isinstance(error, BrokenPipeError):
                raise error


def build(client: Any, name: str, context: Any, **arguments: str) -> None:
    """Builds an image of a context; UserError with the build's last lines when it fails."""
    import docker

    lines: list[str] = []
    try:
        for event in client.build(
            fileobj=context,
            custom_context=True,
            tag=name,
            buildargs=arguments,
            rm=True,
            forcerm=True,
            network_mode="none",
            decode=True,
        ):
            lines.append(str(event.get("stream") or event.get("error") or "").strip())
            if "error" in event:
                words = " | ".join(line for line in lines[-6:] if line)
                raise UserError(f"the image {name} does not build: {words[:600]}", f"its files are in {FOLDER}")
    except (docker.errors.DockerException, OSError) as error:
        raise UserError(f"the image {name} does not build: {str(error)[:300]}", f"its files are in {FOLDER}") from error


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.images", description="Build the images that stages run in.")
    parser.add_argument("kinds", nargs="*", metavar="gpu|score", help="which (both)")
    parser.add_argument("--check", action="store_true", help="only say whether they are there (exit status 1 when not)")
    parser.add_argument("--pip", action="store_true", help="get packages with pip, not from this environment")
    parser.add_argument("--base", default="", help=f"base image (default: python:{version()}-slim, or made here)")
    options = parser.parse_args()
    try:
        for kind in options.kinds or KINDS:
            if kind not in KINDS:
                raise UserError(f"there is no image {kind}", f"there are {', '.join(KINDS)}")
            client = connect()
            if options.check and not has_image(client, image_name(kind)):
                return 1
            print(f"image {require(client, kind, print, pip=options.pip, base=options.base)}")
            client.close()
    except UserError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
