"""Trackers: real event files and a real Prometheus file of a synthetic run, against its own tables."""

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.presets import preset
from flows.progress import Lines
from flows.tracking import PACKAGES, Tracking, tracked
from stages.artifacts import RunDir
from stages.config import RunConfig, UserError, replace
from tests import synthetic_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    config = synthetic_run.config_of(iterations=3, prompts=2, group_size=4, programs=4)
    return synthetic_run.write(tmp_path_factory.mktemp("run") / "run", config)


def told(run: RunDir, config: RunConfig, *, stages: int) -> None:
    """Tells a tracker of the run's first stages, as a start of the flow does."""
    with tracked(run, config, Lines()) as view:
        for stage in synthetic_run.stages_of(config)[:stages]:
            view.finish(stage, seconds=1.0, reused=False)


def mean_reward(run: RunDir, iteration: int) -> float:
    paths = sorted((run.path / f"iterations/{iteration:05d}/score").glob("scores-*.parquet"))
    rewards = [reward for path in paths for reward in pq.read_table(path)["reward"].to_pylist()]
    return sum(rewards) / len(rewards)


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Every scalar in TensorBoard's event files: (name, step, value), the records' framing read by hand."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.rglob("events.out.*")):
        body, place = path.read_bytes(), 0
        while place < len(body):
            (length,) = struct.unpack_from("<Q", body, place)
            event: Any = Event.FromString(body[place + 12 : place + 12 + length])
            place += 16 + length
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_gets_each_iteration_once_over_several_starts(finished: RunDir) -> None:
    pytest.importorskip("tensorboardX")
    config = replace(finished.config(), "logging", tracker="tensorboard")
    stages = synthetic_run.stages_of(config)
    for count in (5, 9, len(stages), len(stages)):  # killed twice on the way; the last start finds all of it done
        told(finished, config, stages=count)
    points = scalars(finished.logs / "tensorboard")
    rewards = [(step, value) for name, step, value in points if name == "reward/mean"]
    assert [step for step, _ in rewards] == [0, 1, 2]
    assert [value for _, value in rewards] == pytest.approx([mean_reward(finished, index) for index in range(3)])
    names = {name for name, _, _ in points}
    assert {"update/loss", "update/kl", "groups/silent", "tokens_per_s/rollout", "seconds/score"} <= names
    scores = [(step, value) for name, step, value in points if name == "evaluate/mean_score"]
    assert [step for step, _ in scores] == [0, 3]


def test_prometheus_finds_the_last_step_in_a_file(finished: RunDir) -> None:
    config = replace(finished.config(), "logging", tracker="prometheus")
    told(finished, config, stages=len(synthetic_run.stages_of(config)))
    lines = (finished.logs / "metrics.prom").read_text().splitlines()
    values = {line.split("{")[0]: line.split()[-1] for line in lines if not line.startswith("#")}
    assert float(values["flexsink_reward_mean"]) == pytest.approx(mean_reward(finished, 2))
    assert values["flexsink_step"] == "3.0"
    assert 'flexsink_step{run="run"} 3.0' in lines


def test_a_tracker_that_fails_fails_no_run_and_is_told_again(tmp_path: Path, finished: RunDir) -> None:
    class Broken:
        calls = 0

        def log(self, values: dict[str, float], step: int) -> None:
            self.calls += 1
            if self.calls == 1:
                raise OSError("no route to host")

    config = replace(finished.config(), "logging", tracker="wandb")
    stage = synthetic_run.stages_of(config)[1]
    tracker = Broken()
    tracking = Tracking(finished, config, tracker)
    for _ in range(3):
        tracking.finish(stage, seconds=1.0, reused=True)
    assert tracker.calls == 2


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_whose_package_is_missing_is_an_error_that_says_what_to_install(finished: RunDir) -> None:
    config = replace(finished.config(), "logging", tracker="wandb")
    with pytest.raises(UserError) as missing, tracked(finished, config, Lines()):
        pass
    assert (missing.value.message, missing.value.hint) == (
        "logging.tracker=wandb needs the package wandb",
        "pip install wandb",
    )


def test_no_tracker_is_the_default_and_every_other_has_its_package_named() -> None:
    from typing import get_args, get_type_hints

    from stages.config import LoggingConfig

    names = set(get_args(get_type_hints(LoggingConfig)["tracker"]))
    assert names == {"none", *PACKAGES}
    assert preset("tiny").logging.tracker == "none"
    assert json.loads(preset("tiny").to_json())["logging"]["tracker"] == "none"
