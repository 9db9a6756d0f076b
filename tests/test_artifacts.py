"""The run directory: keys, manifests, the one way a stage is run, and what a kill or a damaged file does to it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.artifacts import Journal, Manifest, RunDir, Session, StageContext, StageId, decide, derive, execute, survey
from stages.artifacts.keys import STAGES, inputs_of, key_of, upstream_of
from stages.config import RunConfig, TrainConfig, UserError, replace
from tests.patience import PATIENCE_S

LOAD, ROLLOUT, SCORE = StageId("load"), StageId("rollout", 0), StageId("score", 0)
CONFIG = RunConfig(preset="test", train=TrainConfig(iterations=2, seed=7))


def writes(text: str, name: str = "out.txt") -> Callable[[StageContext], None]:
    def function(context: StageContext) -> None:
        (context.out / name).write_text(text)

    return function


def never(context: StageContext) -> None:
    pytest.fail(f"{context.stage} ran although it was done")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run", CONFIG)


def make(run: RunDir, stage: StageId, function: Callable[[StageContext], None]) -> Manifest:
    with Session() as session:
        return execute(run, run.config(), stage, function, session)


def test_a_seed_is_the_documented_hash_and_fits_63_bits() -> None:
    import hashlib

    expected = int.from_bytes(hashlib.sha256(b'[7,"rollout",3]').digest()[:8], "big") >> 1
    assert derive(7, "rollout", 3) == expected < 2**63
    assert derive(7, "rollout", 3) != derive(7, "rollout", 4)
    assert derive(1, 23) != derive(12, 3)


def test_folders_are_where_the_design_puts_them() -> None:
    ids = (LOAD, StageId("update", 12), StageId("evaluate", 24), StageId("export", 24, "mxfp4"))
    folders = [str(stage.folder) for stage in ids]
    assert folders == ["load", "iterations/00012/update", "evaluations/00024", "export/mxfp4"]


def test_a_finished_stage_is_not_run_again_and_keeps_its_bytes(run: RunDir) -> None:
    first = make(run, LOAD, writes("model"))
    inode = run.folder(LOAD).stat().st_ino
    assert make(run, LOAD, never) == first
    assert run.folder(LOAD).stat().st_ino == inode


def test_the_digest_covers_every_file_but_the_timings(run: RunDir, tmp_path: Path) -> None:
    manifest = make(run, LOAD, writes("model"))
    assert set(manifest.files) == {"out.txt", "timings.parquet"}
    other = RunDir.create(tmp_path / "other", CONFIG)
    assert make(other, LOAD, writes("model")).digest == manifest.digest
    assert make(RunDir.create(tmp_path / "third", CONFIG), LOAD, writes("Model")).digest != manifest.digest


@pytest.mark.parametrize("damage", ["flip", "delete", "truncate", "add", "manifest", "digest", "no manifest"])
def test_damage_runs_the_stage_again_and_keeps_the_old_folder(run: RunDir, damage: str) -> None:
    before = make(run, LOAD, writes("model weights"))
    path = run.folder(LOAD) / "out.txt"
    if damage == "flip":
        body = bytearray(path.read_bytes())
        body[3] ^= 1
        path.write_bytes(body)
    elif damage == "delete":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "add":
        (run.folder(LOAD) / "stray.txt").write_text("?")
    elif damage == "manifest":
        manifest = run.folder(LOAD) / "manifest.json"
        manifest.write_text(manifest.read_text().replace(before.files["out.txt"]["sha256"], "0" * 64))
    elif damage == "digest":
        manifest = run.folder(LOAD) / "manifest.json"
        manifest.write_text(manifest.read_text().replace(before.digest, "0" * 64))
    else:
        (run.folder(LOAD) / "manifest.json").unlink()
    assert decide(run, CONFIG, LOAD, {}).action == "RUN"
    assert make(run, LOAD, writes("model weights")).digest == before.digest
    assert (run.path / ".stale-load-0").is_dir()
    assert decide(run, CONFIG, LOAD, {}).action == "REUSE"


def test_what_follows_runs_again_only_if_the_content_changed(run: RunDir) -> None:
    make(run, LOAD, writes("model"))
    make(run, ROLLOUT, writes("completions"))
    (run.folder(LOAD) / "out.txt").unlink()
    assert [decision.action for _, decision in survey(run, CONFIG, [LOAD, ROLLOUT])] == ["RUN", "RUN"]
    make(run, LOAD, writes("model"))
    make(run, ROLLOUT, never)
    (run.folder(LOAD) / "out.txt").unlink()
    make(run, LOAD, writes("another model"))
    ran = []
    make(run, ROLLOUT, lambda context: ran.append(context.stage))
    assert ran == [ROLLOUT]


def test_a_stage_refuses_to_start_on_missing_or_damaged_input(run: RunDir) -> None:
    with pytest.raises(UserError, match=r"rollout 0 needs load, which is not done"):
        make(run, ROLLOUT, never)
    make(run, LOAD, writes("model"))
    (run.folder(LOAD) / "out.txt").write_text("modem")
    with pytest.raises(UserError, match=r"rollout 0 needs load, but out.txt is corrupt"):
        make(run, ROLLOUT, never)


def test_reading_what_is_not_in_the_key_is_a_broken_invariant(run: RunDir) -> None:
    make(run, LOAD, writes("model"))

    def cheats(context: StageContext) -> None:
        context.input(SCORE)

    with pytest.raises(AssertionError, match="not in its key"):
        make(run, ROLLOUT, cheats)


FREE = (
    "train.iterations",
    "evaluate.every",
    "rollout.cache_bytes",
    "update.memory_bytes",
    "steps.runner",
    "sandbox.containers",
    "sandbox.runtime",
    "logging.level",
)
SEVERAL = {
    "rollout.temperature": {"rollout", "update", "evaluate", "export"},
    "rollout.prompts": {"rollout"},
    "update.learning_rate": {"update"},
    "update.lora_rank": {"rollout", "update", "evaluate", "export"},
    "train.seed": {"rollout", "score", "update", "evaluate", "export"},
    "sandbox.cpu_s": {"score", "evaluate", "export"},
    "evaluate.programs": {"evaluate", "export"},
    "model.dtype": {"load", "export"},
}


def key(stage: StageId, config: RunConfig) -> str:
    return key_of(inputs_of(stage, config, {other: "0" * 64 for other in upstream_of(stage)}))


@pytest.mark.parametrize(("name", "stages"), [*SEVERAL.items(), *((name, set()) for name in FREE)])
def test_a_value_is_in_the_keys_of_exactly_the_stages_that_read_it(name: str, stages: set[str]) -> None:
    others = {"steps.runner": "docker", "sandbox.runtime": "runsc", "model.dtype": "float16", "logging.level": "DEBUG"}
    section, _, field = name.partition(".")
    value = CONFIG.flat()[name]
    changed = replace(CONFIG, section, **{field: others.get(name) or value + 1})  # type: ignore[operator]
    ids = [LOAD, ROLLOUT, SCORE, StageId("update", 0), StageId("evaluate", 1), StageId("export", 1, "mxfp4")]
    assert {stage.name for stage in ids} == set(STAGES)
    assert {stage.name for stage in ids if key(stage, CONFIG) != key(stage, changed)} == stages


def test_task_options_are_in_the_keys_of_everything_that_poses_or_judges_the_task() -> None:
    changed = replace(CONFIG, "task", size=5)
    ids = [LOAD, ROLLOUT, SCORE, StageId("update", 0), StageId("evaluate", 1), StageId("export", 1, "bf16")]
    differing = {stage.name for stage in ids if key(stage, CONFIG) != key(stage, changed)}
    assert differing == {"rollout", "score", "evaluate", "export"}


def test_the_reason_names_the_value_that_changed(run: RunDir) -> None:
    make(run, LOAD, writes("model"))
    digest = make(run, ROLLOUT, writes("completions"))
    assert digest.inputs["config"]["rollout.temperature"] == 1.0
    warmer = replace(CONFIG, "rollout", temperature=1.5)
    decisions = dict(survey(run, warmer, [LOAD, ROLLOUT]))
    assert decisions[LOAD].action == "REUSE"
    assert (decisions[ROLLOUT].action, decisions[ROLLOUT].reason) == ("RUN", "rollout.temperature 1.0 -> 1.5")


def test_a_failed_stage_publishes_nothing_and_its_journal_survives(run: RunDir) -> None:
    def fails(context: StageContext) -> None:
        context.journal("work").append({"piece": 1})
        (context.out / "half.txt").write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        make(run, LOAD, fails)
    assert not run.folder(LOAD).exists()
    seen = []

    def finishes(context: StageContext) -> None:
        seen.append(context.journal("work").records())
        seen.append(sorted(path.name for path in context.out.iterdir()))
        (context.out / "out.txt").write_text("whole")

    make(run, LOAD, finishes)
    assert seen == [[{"piece": 1}], ["work.journal"]]
    assert sorted(path.name for path in run.folder(LOAD).iterdir()) == ["manifest.json", "out.txt", "timings.parquet"]


def test_a_journal_that_a_kill_left_behind_the_rename_is_removed(run: RunDir) -> None:
    first = make(run, LOAD, writes("model"))
    journal = run.folder(LOAD) / "work.journal"
    journal.write_text("left\n")
    assert make(run, LOAD, never) == first
    assert not journal.exists()


def test_another_key_does_not_see_the_journal_of_a_failed_try(run: RunDir) -> None:
    def fails(context: StageContext) -> None:
        context.journal("work").append({"piece": 1})
        raise RuntimeError

    with pytest.raises(RuntimeError), Session() as session:
        execute(run, CONFIG, LOAD, fails, session)

    def looks(context: StageContext) -> None:
        assert context.journal("work").records() == []

    with Session() as session:
        execute(run, replace(CONFIG, "model", dtype="float16"), LOAD, looks, session)


def test_a_session_builds_once_and_closes_the_newest_first() -> None:
    order: list[str] = []

    class Item:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            order.append(self.name)
            if self.name == "second":
                raise RuntimeError("second failed")

    session = Session()
    first = session.get("first", lambda: Item("first"))
    session.get("second", lambda: Item("second"))
    session.get("plain", lambda: 3)
    assert session.get("first", lambda: Item("again")) is first
    with pytest.raises(RuntimeError, match="second failed"):
        session.close()
    assert order == ["second", "first"]
    session.close()
    assert order == ["second", "first"]


# A program that makes two stages, the first with a journal, and dies before its n-th file operation in the run
# directory. It forks for each n: every child starts from the same imports. It prints what it saw as JSON.
KILLED_ANYWHERE = """
    import json, os, shutil, signal, sys
    from pathlib import Path
    from stages.artifacts import Journal, Manifest, RunDir, Session, StageId, execute, survey
    from stages.artifacts.parquet import TIMINGS, write_parts
    from stages.config import RunConfig

    root = Path(sys.argv[1])
    stages = [StageId("load"), StageId("rollout", 0)]

    def load(context):
        journal = context.journal("work")
        done = [record["piece"] for record in journal.records()]
        for piece in range(3):
            if piece not in done:
                with open(root / "made.txt", "a") as made:
                    made.write(f"{piece}\\n")
                journal.append({"piece": piece})
        (context.out / "folder").mkdir()
        (context.out / "folder" / "pieces.txt").write_text("0 1 2")

    def rollout(context):
        text = (context.input(stages[0]) / "folder" / "pieces.txt").read_text()
        write_parts(context.out, "rows", [{"what": text}], TIMINGS)

    def work(path):
        run = RunDir(path)
        with Session() as session:
            for stage, function in zip(stages, (load, rollout)):
                execute(run, run.config(), stage, function, session)

    def child(path, number):
        count = 0
        def hook(event, arguments):
            nonlocal count
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir") and str(
                arguments[0]
            ).startswith(str(path)):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        work(path)
        os._exit(0)

    def forked(function, *arguments):
        pid = os.fork()
        if pid == 0:
            try:
                function(*arguments)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    digests, kills, repeats = set(), 0, 0
    for number in range(1, 1000):
        path = root / "run"
        RunDir.create(path, RunConfig())
        (root / "made.txt").unlink(missing_ok=True)
        ended = forked(child, path, number)
        kills += ended == -9
        assert ended in (0, -9), ended
        assert forked(work, path) == 0, number
        run = RunDir(path)
        for stage, decision in survey(run, run.config(), stages):
            assert decision.action == "REUSE", (number, stage, decision.reason)
        assert not list(path.rglob("*.journal")) or number, number
        digests.add(tuple(run.manifest(stage).digest for stage in stages))
        made = (root / "made.txt").read_text().split()
        repeats = max(repeats, len(made) - 3)
        leftovers = [each.name for each in path.rglob(".tmp-*")] + [each.name for each in path.rglob(".stale-*")]
        assert not leftovers, (number, leftovers)
        shutil.rmtree(path)
        if ended == 0:
            break
    print(json.dumps({"kills": kills, "digests": len(digests), "repeats": repeats}))
"""


def test_a_kill_before_any_file_operation_is_harmless(tmp_path: Path) -> None:
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path  # hundreds of fsyncs
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        command = [sys.executable, "-c", textwrap.dedent(KILLED_ANYWHERE), folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["kills"] > 40
    assert seen["digests"] == 1
    # A piece that was made but not yet in the journal when the kill came is made again: that one, and no other.
    assert seen["repeats"] <= 1


def test_two_processes_on_one_stage_make_it_once(run: RunDir, tmp_path: Path) -> None:
    program = """
        import sys, time
        from pathlib import Path
        from stages.artifacts import RunDir, Session, StageId, execute
        def load(context):
            with open(sys.argv[2], "a") as file:
                file.write("ran\\n")
            time.sleep(1.0)
            (context.out / "out.txt").write_text("model")
        run = RunDir(Path(sys.argv[1]))
        with Session() as session:
            execute(run, run.config(), StageId("load"), load, session)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(run.path), str(tmp_path / "ran.txt")]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=PATIENCE_S) for process in both] == [0, 0]
    assert (tmp_path / "ran.txt").read_text() == "ran\n"
    assert decide(run, CONFIG, LOAD, {}).action == "REUSE"


def test_a_run_is_worked_on_by_one_process_at_a_time(run: RunDir) -> None:
    program = """
        import sys
        from pathlib import Path
        from stages.artifacts import RunDir
        with RunDir(Path(sys.argv[1])).lock():
            pass
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(run.path)]
    with run.lock():
        done = subprocess.run(command, capture_output=True, text=True)
    assert "is being worked on by another process" in done.stderr
    assert subprocess.run(command).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 256 KiB."""
    return mounted(tmp_path / "small", "size=256k")


def mounted(path: Path, options: str) -> Path:
    path.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path]).returncode:
        pytest.skip("mounting a file system needs root")
    return path


@pytest.fixture(autouse=True)
def _unmounted(tmp_path: Path):
    yield
    for path in (tmp_path / "small", tmp_path / "fixed"):
        if path.is_dir():
            subprocess.run(["umount", path], capture_output=True)


def test_a_full_disk_is_a_user_error_and_the_stage_goes_on_later(small_disk: Path) -> None:
    run = RunDir.create(small_disk / "run", CONFIG)

    def large(context: StageContext) -> None:
        journal = context.journal("work")
        for piece in range(len(journal.records()), 400):
            journal.append({"piece": piece, "text": "x" * 1000})

    with pytest.raises(UserError, match="the disk is full") as caught:
        make(run, LOAD, large)
    assert "free some space" in caught.value.hint
    assert not run.folder(LOAD).exists()
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    counted = []

    def finishes(context: StageContext) -> None:
        counted.append(len(context.journal("work").records()))

    make(run, LOAD, finishes)
    assert 100 < counted[0] < 260


def test_a_record_that_did_not_fit_costs_none_of_those_after_it(small_disk: Path) -> None:
    journal = Journal(small_disk / "work.journal")
    journal.append({"piece": 1})
    (small_disk / "filler").write_bytes(b"x" * 225_000)
    with pytest.raises(OSError, match="No space left"):
        journal.append({"piece": 2, "text": "x" * 60_000})  # part of it is written
    journal.append({"piece": 3})
    assert journal.records() == [{"piece": 1}, {"piece": 3}]


def test_parquet_on_a_full_disk_is_a_user_error(small_disk: Path) -> None:
    from stages.artifacts.parquet import TIMINGS, write_table

    run = RunDir.create(small_disk / "run", CONFIG)

    def large(context: StageContext) -> None:
        write_table(context.out / "big.parquet", [{"what": os.urandom(300_000).hex()}], TIMINGS)

    with pytest.raises(UserError, match="the disk is full"):
        make(run, LOAD, large)


def test_a_read_only_folder_is_a_user_error(tmp_path: Path) -> None:
    fixed = mounted(tmp_path / "fixed", "size=256k")
    run = RunDir.create(fixed / "run", CONFIG)
    subprocess.run(["mount", "-o", "remount,ro", fixed], check=True)
    with pytest.raises(UserError, match="read-only file system"):
        make(run, LOAD, writes("model"))
    with pytest.raises(UserError, match="read-only file system"):
        RunDir.create(fixed / "another", CONFIG)
    with pytest.raises(UserError, match="read-only file system"), run.lock():
        pass


def test_creating_a_run_refuses_what_is_there(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already holds a run"):
        RunDir.create(run.path, CONFIG)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        RunDir.create(tmp_path / "photos", CONFIG)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        RunDir.create(tmp_path / "file", CONFIG)
    with pytest.raises(UserError, match="holds no run"):
        RunDir.open(tmp_path / "nothing")


def test_a_copied_run_is_as_done_as_the_original(run: RunDir, tmp_path: Path) -> None:
    make(run, LOAD, writes("model"))
    shutil.copytree(run.path, tmp_path / "elsewhere")
    make(RunDir(tmp_path / "elsewhere"), LOAD, never)
