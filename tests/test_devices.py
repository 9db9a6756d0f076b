"""The lock on a device: real processes, a real kill -9, and an nvidia-smi of the test's own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows import devices
from flows.config import overridden, resolved
from flows.presets import preset
from stages.artifacts import RunDir
from stages.config import UserError, replace

ROOT = Path(__file__).parent.parent
FIRST, SECOND = "GPU-11111111-aaaa", "GPU-22222222-bbbb"

HOLD = """
import sys, time
from pathlib import Path
from flows import devices
from stages.artifacts import RunDir
run = RunDir(Path(sys.argv[1]))
with devices.held(run, run.config()):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXSINK_LOCKS", str(tmp_path / "locks"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/nvidia-smi"
    program.write_text(f"#!/bin/sh\necho {FIRST}\necho {SECOND}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.fixture
def bare_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the driver shows of two GPUs below /proc, to a process without nvidia-smi that may use them."""
    folder = tmp_path / "proc/driver/nvidia"
    # The first card of the bus is the second that was found.
    for address, uuid, model in (("0000:c1:00.0", SECOND, "A"), ("0000:01:00.0", FIRST, "B")):
        (folder / "gpus" / address).mkdir(parents=True)
        text = f"Model: \t\t NVIDIA {model}\nIRQ:   \t\t 173\nGPU UUID: \t {uuid}\nBus Location: \t {address}\n"
        (folder / "gpus" / address / "information").write_text(text)
    (folder / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.1\n")
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(devices, "DRIVER", folder)
    monkeypatch.setattr(devices, "CONTROL", tmp_path / "nvidiactl")
    monkeypatch.setenv("PATH", str(tmp_path))
    return folder


def make_run(path: Path, lock: str) -> RunDir:
    return RunDir.create(path, resolved(overridden(preset("tiny_test"), [f"steps.lock={lock}"])))


def holding(run: RunDir) -> "subprocess.Popen[str]":
    """A process that has the run's device."""
    command = [sys.executable, "-c", HOLD, str(run.path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_on_the_same_device_is_told_who_has_it_and_a_kill_frees_it(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a", "cpu"), make_run(tmp_path / "b", "cpu")
    other = make_run(tmp_path / "c", "another")
    process = holding(first)
    try:
        with pytest.raises(UserError) as refused, devices.held(second, second.config()):
            pass
        assert refused.value.message.startswith(f"cpu is at work for {first.path} (process {process.pid} of ")
        assert "steps.lock=none" in refused.value.hint
        with devices.held(other, other.config()):
            pass
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    with devices.held(second, second.config()):
        assert f"{second.path} (process {os.getpid()} of " in devices.holder("cpu")
    assert devices.holder("cpu") == ""


def test_a_run_that_may_wait_says_so_once_and_goes_on_when_the_device_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "POLL_S", 0.05)
    first, second = make_run(tmp_path / "a", "cpu"), make_run(tmp_path / "b", "cpu")
    process = holding(first)
    told: list[str] = []

    def wait(text: str) -> None:
        told.append(text)
        os.kill(process.pid, signal.SIGKILL)

    started = time.monotonic()
    with devices.held(second, second.config(), wait=wait):
        assert time.monotonic() - started < 300
    process.communicate()
    assert len(told) == 1
    assert told[0].startswith("waiting: cpu is at work for ")


def test_runs_share_a_device_when_asked_to(tmp_path: Path, two_gpus: None) -> None:
    first, second = make_run(tmp_path / "a", "none"), make_run(tmp_path / "b", "gpu")
    with devices.held(second, second.config()), devices.held(first, first.config()):
        assert devices.holder(FIRST)
        assert not devices.holder(SECOND)


@pytest.mark.parametrize("machine", ["two_gpus", "bare_driver"])
@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, FIRST),
        ("1", SECOND),
        ("1,0", SECOND),
        ("GPU-2222", SECOND),
        ("MIG-1234", "MIG-1234"),
        ("", None),
        ("-1", None),
        ("7", None),
    ],
)
def test_the_locked_gpu_is_the_one_that_cuda_calls_0(
    machine: str,
    visible: str | None,
    expected: str | None,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request.getfixturevalue(machine)
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.device(make_run(tmp_path / "run", "gpu").config()) == expected
    if expected:
        assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"  # numbers are CUDA's


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"),
    [
        ("auto", None, FIRST),
        ("auto", "1,0", SECOND),
        ("auto", "", None),
        ("all", "1", FIRST),
        ("1", "0", SECOND),
        (SECOND, None, SECOND),
        ("none", None, None),
    ],
)
def test_the_locked_gpu_is_the_first_that_the_stages_container_is_given(
    gpus: str,
    visible: str | None,
    expected: str | None,
    two_gpus: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config = replace(make_run(tmp_path / "run", "gpu").config(), "steps", runner="docker", gpus=gpus)
    assert devices.device(config) == expected


def test_gpus_that_the_driver_does_not_name_are_refused_unless_they_are_shared(
    bare_driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bare_driver / "gpus/0000:01:00.0/information"
    path.write_text(path.read_text().replace(FIRST, "GPU-????????-????-????-????-????????????"))
    config = make_run(tmp_path / "run", "gpu").config()
    with pytest.raises(UserError, match="which GPUs there are") as raised:
        devices.device(config)
    assert "steps.lock=none" in raised.value.hint
    assert devices.device(replace(config, "steps", lock="none")) is None
    assert devices.device(replace(config, "steps", lock="mine")) == "mine"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.device(config) is None


def test_a_process_without_a_gpu_locks_one_only_where_docker_gives_it_to_its_stages(
    bare_driver: Path, tmp_path: Path
) -> None:
    devices.CONTROL.unlink()  # as in the worker's container
    config = make_run(tmp_path / "run", "gpu").config()
    assert devices.device(config) is None
    assert devices.device(replace(config, "steps", runner="docker")) == FIRST
    assert devices.device(replace(config, "steps", runner="docker", gpus="1")) == SECOND
    assert devices.device(replace(config, "steps", runner="docker", gpus="none")) is None


def test_a_machine_without_a_gpu_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "nowhere")
    run = make_run(tmp_path / "run", "gpu")
    with devices.held(run, run.config()):
        assert not (tmp_path / "locks").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_can_lock_a_device_that_somebody_else_used_first(tmp_path: Path) -> None:
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):  # one more where several workers test
        folder.chmod(0o755)
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks").chmod(0o777)
    first = make_run(tmp_path / "a", "cpu")
    with devices.held(first, first.config()):
        pass
    program = """
import os
from flows import devices
os.setuid(65534)
descriptor = devices.opened(devices.lock_file("cpu"))
print(devices.taken(descriptor))
print(os.path.getsize(devices.lock_file("cpu")) > 0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["True", "True"], "")
