"""The bundled model learns: `flexsink train tiny` with seed 0, real engine, sandboxes and Prefect server."""

from pathlib import Path

import pytest

from tests.bench import train_tiny


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.timeout(1500)
def test_the_tiny_model_learns_to_play_within_time_and_memory(
    prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    wall_s, peak = train_tiny.train(0, tmp_path / "run")
    measured = train_tiny.read_back(0, tmp_path / "run", wall_s, peak)
    print(train_tiny.table_row(measured))
    assert measured.missed() == []
    assert wall_s < 2 * train_tiny.MAX_WALL_S
