"""Pools of every sandbox backend there is, for tests that each must pass; one that this machine lacks is skipped."""

from collections.abc import Mapping
from typing import Any

import pytest

from stages.config import SandboxConfig, UserError
from stages.sandbox import SandboxPool, open_pool
from stages.self_check import backends

BACKENDS = [pytest.param(name, marks=pytest.mark.docker if name == "docker" else ()) for name in backends()]


def opened(backend: str, *, harnesses: Mapping[str, str], run: str, **settings: Any) -> SandboxPool:
    """A pool of that backend; where the machine lacks Docker the test fails, where it lacks another it is skipped."""
    config = SandboxConfig(backend=backend, **settings)  # type: ignore[arg-type]
    try:
        return open_pool(config, harnesses=harnesses, labels={"flexsink.run": run})
    except UserError as error:
        if backend == "docker":
            raise
        pytest.skip(f"sandbox.backend={backend}: {error.message}")
