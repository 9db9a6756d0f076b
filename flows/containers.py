"""Stages in containers: one long-lived container with the GPU for load, rollout, update, evaluate and export, and one
for each score.

    with Crew(run, config) as crew:
        crew.make(config, StageId("rollout", 3), key, report)

This process alone talks to Docker. What runs in a container is stages/worker.py, as the caller's user and group, with
the run directory, the checkpoint (read only) and the sandboxes' sockets as volumes at the paths they have here, on a
read-only root, without capabilities and without a network: a checkpoint of the hub is fetched here. Programs are judged
in sandboxes that this process keeps (stages/sandbox/keeper.py). Containers end with this process, killed or not, and
bear the run's label, by which the next start removes what is left.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from flows import devices, images
from stages.artifacts import Progress, RunDir, StageId
from stages.artifacts.stage import Report
from stages.config import RunConfig, UserError
from stages.sandbox.attached import REMOVE_S, STDOUT, Attached, remove
from stages.sandbox.image import connect
from stages.sandbox.keeper import Keeper

log = logging.getLogger(__name__)

SANDBOXES = "/sandboxes"
LABEL = "flexsink.image"
JUDGING = ("evaluate", "score", "export")  # stages that need sandboxes
STATUS_S = 60.0  # how long the daemon may take to say how a container ended
UNSTARTED_S = 600.0  # a container that nobody started for so long is nobody's
KILLED, STOPPED = 137, 143
NO_RUNTIME = "could not select device driver"


class StageFailed(RuntimeError):
    """A stage raised what nobody expected; the message is its traceback."""


class Crew:
    """The containers of one run, each started when it is first needed."""

    def __init__(self, run: RunDir, config: RunConfig, note: Callable[[str], None] = print) -> None:
        """Starts nothing yet. note: told when an image has to be built."""
        self.run, self.config, self.note = run, config, note
        self.volume = ""
        self.keeper: Keeper | None = None
        self.gpu: StageContainer | None = None

    def make(self, config: RunConfig, stage: StageId, key: str, report: Report) -> None:
        """Has the stage made; what it logs and prints comes out here as it happens.

        Errors: UserError as the stage raised it, for a container that was killed or ran out of memory, and where Docker
        lacks something; StageFailed with the traceback of anything else.
        """
        self.keep_sandboxes(stage.name in JUDGING)
        labels = {"flexsink.stage": str(stage), "flexsink.key": key}
        if stage.name != "score":
            if self.gpu is None:
                labels["flexsink.stage"] = "load rollout update evaluate export"
                self.gpu = self.start("gpu", labels)
            try:
                self.gpu.ask(config, stage, report)
            except BaseException:
                if self.gpu.ended:
                    self.gpu.discard()
                    self.gpu = None
                raise
        else:
            container = self.start("score", labels)
            try:
                container.ask(config, stage, report)
            finally:
                container.discard()

    def keep_sandboxes(self, needed: bool) -> None:
        """Makes the volume of their sockets, which every container gets, and where they are needed the sandboxes."""
        if not self.volume:
            client = connect()
            try:
                name = f"flexsink-{self.run.labels()['flexsink.run'][:12].strip('/').replace('/', '-')}-{os.getpid()}"
                self.volume = client.create_volume(name, labels=self.run.labels())["Name"]
            finally:
                client.close()
        if needed and self.keeper is None:
            self.keeper = Keeper(self.config.sandbox, labels=self.run.labels(), volume=self.volume, group=os.getgid())

    def start(self, kind: str, labels: Mapping[str, str]) -> "StageContainer":
        """A container of that image, its worker about to listen."""
        client = connect()
        try:
            image = images.require(client, kind, self.note, task=self.config.task.name)
        except BaseException:
            client.close()
            raise
        requests = device_requests(self.config.steps.gpus) if kind == "gpu" else []
        limit = self.config.steps.memory_bytes
        home, mounts, variables = surroundings(self.run, self.config)
        # A tmpfs over a folder of the image gets that folder's mode, whatever is asked for: let it be the caller's.
        memory = f"rw,exec,mode=1777,uid={os.getuid()},gid={os.getgid()}"
        options: dict[str, Any] = {
            "command": [str(self.run.path), "--sandboxes", SANDBOXES, "--image", image],
            "environment": {**variables, "HOME": home, "USER": "flexsink", "LOGNAME": "flexsink"},
            "network_disabled": True,
            "user": f"{os.getuid()}:{os.getgid()}",
            "working_dir": str(Path.cwd()),
            "host_config": client.create_host_config(
                auto_remove=True,
                binds=[*mounts, f"{self.volume}:{SANDBOXES}:ro"],
                cap_drop=["ALL"],
                device_requests=requests or None,
                group_add=sorted(set(os.getgroups()) - {os.getgid()}) or None,
                init=True,
                log_config={"Type": "none"},
                mem_limit=limit or None,
                memswap_limit=limit or None,
                network_mode="none",
                read_only=True,
                security_opt=["no-new-privileges:true"],
                # Kernels are compiled, and loaded, below the temporary folder or the home.
                tmpfs={"/tmp": memory, home: memory},
            ),
        }
        return StageContainer(
            client, image, labels={**self.run.labels(), LABEL: kind, **labels}, memory_bytes=limit, options=options
        )

    def close(self) -> None:
        """Ends every container and removes the volume."""
        if self.gpu is not None:
            self.gpu.discard()
            self.gpu = None
        if self.keeper is not None:
            self.keeper.close()
            self.keeper = None
        if self.volume:
            client = connect()
            try:
                remove_volume(client, self.volume)
            finally:
                client.close()
            self.volume = ""

    def __enter__(self) -> "Crew":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StageContainer:
    """A running worker: asked for one stage at a time."""

    def __init__(
        self, client: Any, image: str, *, labels: Mapping[str, str], memory_bytes: int, options: dict[str, Any]
    ) -> None:
        """Starts it; UserError when Docker does not."""
        import docker

        self.memory_bytes = memory_bytes
        self.started = time.time()
        self.ended = False
        self.status: int | None = None
        self.words: list[str] = []  # the last lines of its standard error
        try:
            self.attached = Attached(client, image, labels=labels, **options)
            self.waiter = threading.Thread(target=self.wait, name="container-status", daemon=True)
            self.waiter.start()
            self.attached.start()
        except (docker.errors.DockerException, OSError) as error:
            raise explained(error) from error
        assert self.attached.socket is not None
        self.attached.socket.settimeout(None)

    def wait(self) -> None:
        """Notes the exit status of the container, which is removed when it ends."""
        import docker

        with contextlib.suppress(docker.errors.DockerException, OSError, UserError):
            client = connect(timeout=None)
            try:
                self.status = client.wait(self.attached.id, condition="removed")["StatusCode"]
            finally:
                client.close()

    def ask(self, config: RunConfig, stage: StageId, report: Report) -> None:
        """Returns when the stage is made; the errors of Crew.make."""
        asked = {"stage": [stage.name, stage.index, stage.label], "config": config.to_dict()}
        assert self.attached.socket is not None
        with contextlib.suppress(OSError):  # it has ended: the first line will be missing
            self.attached.socket.sendall(json.dumps(asked).encode() + b"\n")
        for stream, line in self.lines():
            if stream != STDOUT:
                self.words = [*self.words[-19:], line]
                print(line, file=sys.stderr, flush=True)
                log.info("%s: %s", stage, line)
                continue
            match json.loads(line):
                case {"progress": [name, done, total, unit, fields]}:
                    report(Progress(name, done, total, unit, fields))
                case {"log": [name, level, text]}:
                    logger = logging.getLogger(name)
                    if logger.isEnabledFor(level):
                        logger.handle(logger.makeRecord(name, level, "", 0, "%s", (text,), None))
                    if level >= logging.WARNING and name.startswith("stages"):
                        print(f"{stage}: {text}", file=sys.stderr, flush=True)
                case {"ready": True}:
                    log.info("%s: its container was ready after %.1f s", stage, time.time() - self.started)
                case {"done": True}:
                    return
                case {"error": [message, hint]}:
                    raise UserError(message, hint)
                case {"failed": trace}:
                    raise StageFailed(f"{stage} failed in its container:\n{trace}")
        self.ended = True
        raise self.death(stage)

    def lines(self) -> Iterator[tuple[int, str]]:
        """Every line that it writes, with the stream, until it ends."""
        rests: dict[int, bytes] = {}
        while (frame := self.frame()) is not None:
            stream, data = frame
            *whole, rests[stream] = (rests.get(stream, b"") + data).split(b"\n")
            for line in whole:
                yield stream, line.decode("utf-8", "replace")
        for stream, rest in rests.items():
            if rest and stream != STDOUT:
                yield stream, rest.decode("utf-8", "replace")

    def frame(self) -> tuple[int, bytes] | None:
        try:
            return self.attached.frame()
        except OSError:  # the daemon is gone
            return None

    def death(self, stage: StageId) -> UserError:
        """What the end of the container in the middle of a stage means."""
        self.waiter.join(STATUS_S)
        resume = "what was finished is kept; go on with: flexsink resume RUN"
        if self.out_of_memory():
            limit = f" of {self.memory_bytes / 2**20:.0f} MiB" if self.memory_bytes else ""
            return UserError(
                f"{stage} ran out of memory in its container{limit}",
                "raise steps.memory_bytes (0: no limit), or start a run with a smaller rollout.max_slots",
            )
        if self.status in (KILLED, STOPPED, None):
            how = "was stopped" if self.status == STOPPED else "was killed" if self.status == KILLED else "is gone"
            return UserError(f"the container of {stage} {how} from outside", resume)
        last = f": {self.words[-1]}" if self.words else ""
        return UserError(f"the container of {stage} ended with status {self.status}{last}", resume)

    def out_of_memory(self) -> bool:
        """Whether the daemon has seen the kernel kill something in the container for want of memory."""
        import docker

        wanted = {"container": self.attached.id, "event": "oom"}
        try:
            client = connect()
            try:
                events = client.events(since=f"{self.started - 1:.3f}", until=f"{time.time():.9f}", filters=wanted)
                return any(True for _ in events)
            finally:
                client.close()
        except (docker.errors.DockerException, OSError, UserError):
            return False

    def discard(self) -> None:
        """Ends and removes it; never raises."""
        self.ended = True
        self.attached.discard()


def explained(error: Exception) -> UserError:
    """Why Docker did not start a container, in a line."""
    words = str(getattr(error, "explanation", None) or error).strip().splitlines()[0][:300]
    if NO_RUNTIME in words:
        return UserError(
            f"Docker cannot give a container a GPU: {words}",
            "install nvidia-container-toolkit and run `nvidia-ctk runtime configure`, or set steps.gpus=none",
        )
    return UserError(f"Docker does not start a container for stages: {words}", "look at the daemon's log")


def device_requests(gpus: str) -> list[dict[str, Any]]:
    """What Docker is asked for: none, every card (all), or by number or UUID those that a list names; auto is one card,
    of those that CUDA_VISIBLE_DEVICES leaves, where this machine has any."""
    if gpus == "auto":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        there = (devices.DRIVER / "version").exists() and visible not in ("", "-1")
        gpus = (visible.split(",")[0] if visible else "one") if there else "none"
    if gpus in ("none", ""):
        return []
    request: dict[str, Any] = {"Driver": "", "Capabilities": [["gpu"]], "Options": {}, "Count": 0, "DeviceIDs": None}
    if gpus in ("one", "all"):
        return [{**request, "Count": 1 if gpus == "one" else -1}]
    return [{**request, "DeviceIDs": gpus.split(",")}]


def surroundings(run: RunDir, config: RunConfig) -> tuple[str, list[str], dict[str, str]]:
    """The home, the bind mounts and the variables of a stage's container: everything has the path that it has here."""
    path = run.path.absolute()
    mounts = [f"{path}:{path}:rw"]
    variables = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    source = Path(config.model.source).expanduser()
    if source.is_dir():
        checkpoint = source.absolute()
        if not checkpoint.is_relative_to(path):
            mounts.append(f"{checkpoint}:{checkpoint}:ro")
        mounts += linked(checkpoint, besides=(path, checkpoint))
    else:
        cache = fetched(config.model.source, trains_here=not device_requests(config.steps.gpus))
        mounts.append(f"{cache}:{cache}:ro")
        variables["HF_HUB_CACHE"] = str(cache)
    for mount in mounts:
        if mount.count(":") != 2:
            raise UserError(f"Docker cannot mount {mount.rpartition(':')[0]}", "use a path without a colon")
    for name in ("FLEXSINK_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_LOGS", "TRITON_INTERPRET"):
        if name in os.environ:
            variables[name] = os.environ[name]
    home = Path.home()
    taken = [*("/usr", "/opt", "/lib", "/proc"), *(mount.split(":")[0] for mount in mounts)]
    usable = home != Path("/") and not any(home.is_relative_to(each) for each in taken)
    return str(home) if usable else "/tmp/home", mounts, variables


def linked(folder: Path, *, besides: Iterable[Path]) -> list[str]:
    """Read-only mounts of the files that links in `folder` lead to, such as ../../blobs/1f2e in a hub's snapshot.

    Each is mounted alone, where the link leads in the container: its folder may hold anything. Those below `besides`
    are in the container anyway.
    """
    mounts = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and path.is_file():
            target = Path(os.path.normpath(folder / path.readlink()))
            if not any(target.is_relative_to(each) for each in besides):
                mounts.append(f"{path.resolve()}:{target}:ro")
    return list(dict.fromkeys(mounts))  # two names of one file are one mount


def fetched(source: str, *, trains_here: bool) -> Path:
    """The hub's cache on this machine, with that checkpoint in it; UserError when it cannot be fetched.

    trains_here: what this process sees of GPUs decides; not where the container is to get one, since this process may
    be in a container that has none.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    from stages.model.checkpoint import locate

    locate(source, trains_here=trains_here)
    return Path(HF_HUB_CACHE).absolute()


def remove_volume(client: Any, name: str) -> None:
    """Removes a volume; never raises: it may be gone, or a container that is just ending may still hold it."""
    import docker

    deadline = time.monotonic() + REMOVE_S
    while time.monotonic() < deadline:
        try:
            client.remove_volume(name)
        except docker.errors.NotFound:
            return
        except docker.errors.APIError:
            time.sleep(0.05)
        except (docker.errors.DockerException, OSError):
            return
        else:
            return


def reap(labels: Mapping[str, str]) -> int:
    """Removes what bears these labels: containers, and then volumes. Returns how many containers; UserError without
    Docker.

    With them go containers of other runs that were made long ago and never started: whoever made them was killed in
    between, and that run may never be gone on with.
    """
    client = connect()
    try:
        wanted = [f"{name}={value}" for name, value in labels.items()]
        found = client.containers(all=True, filters={"label": wanted})
        unstarted = client.containers(all=True, filters={"label": list(labels), "status": "created"})
        for container in (*found, *abandoned(unstarted, now=time.time())):
            remove(client, container["Id"])
        for volume in client.volumes(filters={"label": wanted})["Volumes"] or ():
            remove_volume(client, volume["Name"])
    finally:
        client.close()
    return len(found)


def abandoned(unstarted: Iterable[Mapping[str, Any]], *, now: float) -> list[Mapping[str, Any]]:
    """Of containers that were made and never started, as the daemon lists them, those that nobody will start."""
    return [container for container in unstarted if now - container["Created"] > UNSTARTED_S]
