"""Fixtures that several files share."""

import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch, here and in what tests start
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton, which reads it once

from tests.random_gpt_oss import write_checkpoint

torch.set_num_threads(1)  # as the policy does: neither speed nor last bits depend on the tests' order

# A machine for the tests marked gpu may lack what others need.
NEEDED = {
    "textual": ["test_view.py"],
    "docker": ["test_stage_images.py", "test_stage_containers.py", "test_contained_runs.py", "test_sandbox_sockets.py"],
}
collect_ignore = [name for module, names in NEEDED.items() if not importlib.util.find_spec(module) for name in names]

CALM_PERCENT, CALM_WITHIN_S = 25, 60


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what wants a card where there is none. Before a test that measures time: waits for what others left to
    write and to end, a minute at most.
    """
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA card")
    if item.get_closest_marker("timed"):
        import psutil

        os.sync()
        give_up = time.monotonic() + CALM_WITHIN_S
        while psutil.cpu_percent(interval=0.5) > CALM_PERCENT and time.monotonic() < give_up:
            pass


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random gpt-oss in the MXFP4 layout: 4 layers, the true architecture, weights that matter."""
    return write_checkpoint(tmp_path_factory.mktemp("gpt_oss"))


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prefect server of the test session's own."""
    from flows import server

    home = tmp_path_factory.mktemp("prefect")
    yield server.start(home)
    server.stop(home)


@pytest.fixture(scope="session")
def stage_images() -> None:
    """Both images of stages; building them takes a minute where they are missing."""
    from flows import images
    from stages.sandbox.image import connect

    client = connect()
    for kind in images.KINDS:
        images.require(client, kind, print)
    client.close()
