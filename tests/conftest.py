"""Fixtures that several files share."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton, which reads it once

from tests.random_gpt_oss import write_checkpoint

# A machine for the tests marked gpu may lack what others need.
NEEDED = {"textual": ["test_view.py"], "docker": ["test_stage_images.py", "test_stage_containers.py"]}
collect_ignore = [name for module, names in NEEDED.items() if not importlib.util.find_spec(module) for name in names]


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random gpt-oss in the MXFP4 layout: 4 layers, the true architecture, weights that matter."""
    torch.set_num_threads(1)  # as the policy does
    return write_checkpoint(tmp_path_factory.mktemp("gpt_oss"))


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prefect server of the test session's own."""
    from flows import server

    home = tmp_path_factory.mktemp("prefect")
    yield server.start(home)
    server.stop(home)
