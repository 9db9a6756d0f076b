"""A card after kill -9 of the process at work on it, and what the next process makes of what was left on the disk.

Run on one card that nothing else uses: python -m pytest -m gpu tests/test_killed_on_gpu.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flows.config import overridden
from flows.presets import preset
from stages.artifacts import RunDir, Session, StageId, execute
from stages.artifacts.parquet import ROLLOUTS, read_table
from tests.test_rollout_update import FUNCTIONS

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[1]
HELD = 64 * 2**20  # bytes; a CUDA context alone takes several times that
SETTINGS = ["train.iterations=1", "rollout.prompts=4", "model.experts=mxfp4", "model.dtype=bfloat16"]
# The stage notes what is free on the card, and is killed from outside where it waits.
STOPS = """
import sys, time, torch
from pathlib import Path
from stages import rollout, update
from stages.artifacts import command
name, done, note = sys.argv.pop(1), int(sys.argv.pop(1)), Path(sys.argv.pop(1))
def stop(progress):
    if progress.done == done:
        torch.cuda.synchronize()
        note.with_suffix(".new").write_text(str(torch.cuda.mem_get_info()[0]))
        note.with_suffix(".new").rename(note)
        time.sleep(600)
command.print_progress = stop
{"rollout": rollout, "update": update}[name].main()
"""


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0]


@pytest.mark.parametrize(("stage", "done"), [("rollout", 5), ("update", 1)])
def test_a_process_killed_on_the_card_leaves_no_memory_there_and_the_next_one_ends_its_stage(
    stage: str, done: int, tmp_path: Path
) -> None:
    run = RunDir.create(tmp_path / "run", overridden(preset("tiny_test"), SETTINGS))
    config = run.config()
    before_it = {"rollout": ["load"], "update": ["load", "rollout", "score"]}[stage]
    with Session() as session:
        for name in before_it:
            execute(run, config, StageId(name, None if name == "load" else 0), FUNCTIONS[name], session)
    torch.cuda.empty_cache()
    free, note = free_bytes(), tmp_path / "free"

    words = ["--run-dir", str(run.path), "--iteration", "0"]
    process = subprocess.Popen([sys.executable, "-c", STOPS, stage, str(done), str(note), *words], cwd=ROOT)
    try:
        wait_for(lambda: note.exists() or process.poll() is not None, 120)
        assert process.poll() is None, "it was not stopped in the middle of its stage"
        assert int(note.read_text()) < free - HELD
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    wait_for(lambda: free_bytes() > free - HELD, 20)

    journals = list(run.folder(StageId(stage, 0)).parent.glob(".tmp-*/completions.journal"))
    assert len(journals) == (stage == "rollout")
    for journal in journals:
        # A second name for the file: what the next process appends can be read after the stage has removed its own.
        os.link(journal, tmp_path / "journal")
    kept = completions(tmp_path / "journal")
    assert len(kept) >= done or stage != "rollout"
    assert subprocess.run([sys.executable, "-m", f"stages.{stage}", *words], cwd=ROOT, timeout=300).returncode == 0
    wait_for(lambda: free_bytes() > free - HELD, 20)
    assert run.manifest(StageId(stage, 0)) is not None
    if stage == "rollout":
        table = read_table(run.folder(StageId(stage, 0)), "rollouts", ROLLOUTS).to_pylist()
        written = completions(tmp_path / "journal")
        assert written[: len(kept)] == kept
        assert sorted(written) == sorted((row["completion_id"], row["completion_ids"]) for row in table)


def completions(journal: Path) -> list[tuple[str, list[int]]]:
    """Id and tokens of each completion in a journal, in its order; none without one."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    records = [json.loads(line.split(" ", 1)[1]) for line in lines]
    return [(record["completion_id"], record["completion_ids"]) for record in records]


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)
