"""SandboxPool: programs judged in warm sandboxes, one thread a sandbox; by config.backend containers or local ones.

A job that a sandbox could not finish is tried on another one; after MAX_ATTEMPTS its future raises SandboxError. A
sandbox is replaced after `jobs_per_container` jobs, and at once after a timeout, an out-of-memory kill or anything
it should not have said.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from stages.config import SandboxConfig, UserError
from stages.sandbox.attached import remove
from stages.sandbox.channel import Sandbox
from stages.sandbox.container import Container
from stages.sandbox.image import connect, require_image
from stages.sandbox.local import LocalSandbox, find_walls
from stages.sandbox.protocol import MAX_PROGRAM_BYTES, Job, Outcome, Result, SandboxError
from stages.sandbox.sockets import Sockets, SocketSandbox

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
PAUSE_S = 0.3  # before each further attempt, times those already made: a daemon that restarts is away for a second
JOBS_PER_CONTAINER = 500
LABEL = "flexsink.sandbox"  # on every container of every pool


@dataclass
class Waiting:
    """A job in the queue, with how often it was tried."""

    job: Job
    future: "Future[Result]"
    attempts: int = 0


class SandboxPool:
    """N warm containers behind one queue. submit() never blocks; results come in the order they are ready."""

    def __init__(
        self,
        config: SandboxConfig,
        *,
        harnesses: Mapping[str, str],
        labels: Mapping[str, str],
        jobs_per_container: int = JOBS_PER_CONTAINER,
        sockets: Path | None = None,
    ) -> None:
        """Starts the threads, which start the sandboxes; UserError when what the backend needs is not there."""
        self.config = config
        self.harnesses = dict(harnesses)
        self.labels = {**labels, LABEL: "1"}
        self.jobs_per_container = jobs_per_container
        self.make = maker(config, harnesses=self.harnesses, labels=self.labels, sockets=sockets)
        self.waiting: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self.closing = False
        self.lock = threading.Lock()
        self.live: set[Sandbox] = set()
        self.num_started = 0
        self.undertaker = ThreadPoolExecutor(1, thread_name_prefix="sandbox-undertaker")
        self.threads = [
            threading.Thread(target=self.work, name=f"sandbox-{index}", daemon=True)
            for index in range(config.containers)
        ]
        for thread in self.threads:
            thread.start()

    def submit(self, job: Job) -> "Future[Result]":
        """Returns the future verdict on a job; it raises SandboxError when the sandbox failed MAX_ATTEMPTS times."""
        if self.closing:
            raise ValueError("the pool is closed")
        if job.harness not in self.harnesses:
            raise ValueError(f"no harness {job.harness}: the pool was opened with {sorted(self.harnesses)}")
        future: Future[Result] = Future()
        size = len(job.program.encode("utf-8", "surrogatepass"))
        if size > MAX_PROGRAM_BYTES:
            detail = f"a program of {size} bytes; the limit is {MAX_PROGRAM_BYTES}"
            future.set_result(Result(job_id=job.job_id, outcome=Outcome.output_limit, detail=detail, cases=()))
        else:
            self.waiting.put(Waiting(job, future))
        return future

    @property
    def num_waiting(self) -> int:
        """How many jobs no container has taken yet."""
        return self.waiting.qsize()

    def work(self) -> None:
        """The life of one thread and its container."""
        container: Sandbox | None = None
        try:
            container = self.start()
        except Exception:
            container = None  # tried again, and told, with the first job
        while (waiting := self.waiting.get()) is not None:
            if waiting.attempts == 0 and not waiting.future.set_running_or_notify_cancel():
                continue
            waiting.attempts += 1
            try:
                if container is None:
                    container = self.start()
                result, reusable = container.judge(waiting.job)
            except SandboxError as error:
                self.bury(container)
                container = None
                if waiting.attempts < MAX_ATTEMPTS and not self.closing:
                    time.sleep(PAUSE_S * waiting.attempts)
                    self.waiting.put(waiting)
                else:
                    waiting.future.set_exception(error)
                continue
            except Exception as error:
                self.bury(container)
                container = None
                waiting.future.set_exception(error)
                continue
            if not reusable or container.num_jobs >= self.jobs_per_container:
                self.bury(container)
                container = None
            waiting.future.set_result(result)
        self.bury(container)

    def start(self) -> Sandbox:
        container = self.make()
        with self.lock:
            self.live.add(container)
            self.num_started += 1
        return container

    def bury(self, container: Sandbox | None) -> None:
        """Has the container removed while its thread goes on with another."""
        if container is not None:
            with self.lock:
                self.live.discard(container)
            self.undertaker.submit(container.discard)

    def close(self) -> None:
        """Ends every container at once; jobs still waiting are cancelled, running ones raise SandboxError."""
        if self.closing:
            return
        self.closing = True
        while True:
            try:
                waiting = self.waiting.get_nowait()
            except queue.Empty:
                break
            if waiting is not None and not waiting.future.cancel():
                waiting.future.set_exception(SandboxError("the pool was closed"))
        for _ in self.threads:
            self.waiting.put(None)
        with self.lock:
            live = list(self.live)
        for container in live:
            container.hang_up()
        for thread in self.threads:
            thread.join()
        self.undertaker.shutdown(wait=True)

    def __enter__(self) -> "SandboxPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def maker(
    config: SandboxConfig, *, harnesses: Mapping[str, str], labels: Mapping[str, str], sockets: Path | None = None
) -> Callable[[], Sandbox]:
    """Returns what starts a sandbox of the configured backend; UserError when what that needs is not there."""
    if sockets is not None:
        listening = Sockets(sockets)
        return lambda: SocketSandbox(listening, harnesses=harnesses, memory_bytes=config.memory_bytes)
    if config.backend == "local":
        if config.runtime:
            raise UserError(
                f"sandbox.runtime={config.runtime} is Docker's", "leave it empty, or set sandbox.backend=docker"
            )
        walls = find_walls()
        for kind, reason in walls.lacking.items():
            log.warning("local sandboxes have no %s (%s): %s", kind, reason, walls)
        return lambda: LocalSandbox(walls=walls, harnesses=harnesses, memory_bytes=config.memory_bytes)
    if config.backend != "docker":
        raise UserError(f"sandbox.backend={config.backend} is none", "set it to docker or local")
    client = connect()
    image = usable_image(client, config)
    client.close()
    return lambda: Container(
        image=image,
        harnesses=harnesses,
        labels=labels,
        memory_bytes=config.memory_bytes,
        runtime=config.runtime,
    )


def usable_image(client: Any, config: SandboxConfig) -> str:
    """Returns the sandbox image's name; UserError when it or the configured runtime is missing."""
    image = require_image(client)
    if config.runtime and config.runtime not in client.info().get("Runtimes", {}):
        raise UserError(
            f"Docker has no runtime {config.runtime}",
            "set sandbox.runtime to one that `docker info` lists, or to nothing",
        )
    return image


def open_pool(
    config: SandboxConfig, *, harnesses: Mapping[str, str], labels: Mapping[str, str], sockets: Path | None = None
) -> SandboxPool:
    """Returns a pool of config.containers warm sandboxes that know these harnesses (name -> source text).

    UserError when Docker or the image is missing, or the kernel gives too little for the backend local. Containers bear
    `labels`, by which reap() finds what a killed run left; a local sandbox ends with the process that opened it.
    sockets: a folder in which another process keeps sandboxes that listen (keeper.py); none is started then.
    """
    return SandboxPool(config, harnesses=harnesses, labels=labels, sockets=sockets)


def reap(labels: Mapping[str, str], *, backend: str = "docker") -> int:
    """Removes the sandbox containers that bear all these labels; returns how many. UserError without a daemon.

    The backend local leaves nothing: its sandboxes end with whoever opened them.
    """
    if backend == "local":
        return 0
    client = connect()
    wanted = [LABEL, *(f"{name}={value}" for name, value in labels.items())]
    found = client.containers(all=True, filters={"label": wanted})
    for container in found:
        remove(client, container["Id"])
    client.close()
    return len(found)
