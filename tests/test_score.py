"""The score stage over recorded completions: behind pipes, and once in real sandboxes."""

import threading

import pytest

from stages import score
from stages.artifacts import RunDir, Session, StageId, execute
from stages.artifacts.parquet import ROLLOUTS, read_table, write_parts
from stages.config import RunConfig, SandboxConfig, TaskConfig, UserError
from stages.sandbox.image import connect
from stages.tasks import checks, judging, registry, tables
from tests.patience import PATIENCE_S
from tests.program_pipes import PipePool

FINAL = "<|channel|>final<|message|>"
LEFT_UP = FINAL + "```python\ndef strategy(board):\n    return 'AWDS'[sum(map(sum, board)) // 2 % 4]\n```<|return|>"
RANDOM = FINAL + "```python\nimport random\ndef strategy(board):\n    return random.choice('WASD')\n```<|return|>"
QUITS = FINAL + "```python\ndef strategy(board):\n    return None\n```<|return|>"
BROKEN = FINAL + "```python\ndef strategy(board:\n```<|return|>"
CRASHES = FINAL + "```python\ndef strategy(board):\n    raise ValueError\n```<|return|>"
CUT_SHORT = FINAL + "```python\ndef strategy(board):\n    return 'A'"
FOREIGN = FINAL + "```python\nimport os\ndef strategy(board):\n    return 'A'\n```<|return|>"
LOOPS = (
    FINAL
    + """```python
calls = 0
def strategy(board):
    global calls
    calls += 1
    while calls > 60:
        pass
    return "AWDS"[calls % 4]
```<|return|>"""
)
CHEATS = (
    FINAL
    + """```python
import random
def strategy(board):
    for row in board:
        row[:] = [2048] * len(row)
    random.seed = random.random = lambda *a: 0.0
    globals()["done"] = True
    return "W"
```<|return|>"""
)
COMPLETIONS = [LEFT_UP, QUITS, LEFT_UP, BROKEN, RANDOM, CUT_SHORT, LEFT_UP, RANDOM]  # two groups of four
REWARDS = ("works", "no_cheating", "strategy")


def rollout_row(iteration, number, completion):
    name = f"{iteration:05d}-{number // 4:03d}-{number % 4:03d}"
    return {
        "completion_id": name,
        "prompt_id": name[:9],
        "group_index": number // 4,
        "sample_index": number % 4,
        "iteration": iteration,
        "policy_version": iteration,
        "task": "game2048",
        "prompt": "?",
        "completion": completion,
        "prompt_ids": [1],
        "completion_ids": [2],
        "engine_logprobs": [-0.5],
        "finish_reason": "stop",
        "seed": 1,
        "num_tokens": 1,
    }


def prepared(folder, completions=COMPLETIONS, **task):
    """A run whose load and rollout are done."""
    config = RunConfig(
        task=TaskConfig(options=tuple({"games": 3, "max_moves": 60, **task}.items())),
        sandbox=SandboxConfig(containers=2, cpu_s=1.0),
    )
    run = RunDir.create(folder, config)
    rows = [rollout_row(0, number, completion) for number, completion in enumerate(completions)]
    with Session() as session:
        execute(run, config, StageId("load"), lambda context: (context.out / "x").write_text("x"), session)
        write = lambda context: write_parts(context.out, "rollouts", rows, ROLLOUTS)  # noqa: E731
        execute(run, config, StageId("rollout", 0), write, session)
    return run, config


def pipes(config, **options):
    return PipePool(registry.of(config).harness_source(), **options)


def scored(run, config, pool, report=lambda progress: None):
    session = Session()
    session.get("sandbox", lambda: pool)
    execute(run, config, StageId("score", 0), score.run, session, report)
    return read_table(run.folder(StageId("score", 0)), "scores", tables.scores(registry.get("game2048"))).to_pylist()


def test_every_completion_gets_its_verdict_in_the_order_of_the_ids(tmp_path):
    run, config = prepared(tmp_path)
    rows = scored(run, config, pipes(config))
    assert [row["completion_id"] for row in rows] == [f"00000-{n // 4:03d}-{n % 4:03d}" for n in range(8)]
    outcomes = ["ok", "ok", "ok", "syntax_error", "ok", "no_program", "ok", "ok"]
    assert [row["outcome"] for row in rows] == outcomes
    assert [row["program"] is None for row in rows] == [outcome == "no_program" for outcome in outcomes]
    for row in rows:
        assert row["reward"] == pytest.approx(sum(row[f"reward_{name}"] for name in REWARDS))
    played, quit_at_once, _, broken, *_ = rows
    assert played["reward"] > quit_at_once["reward"] > broken["reward"] == -1
    assert {game["state"] for game in quit_at_once["games"]} == {"illegal"}


def test_a_group_shares_its_hidden_seeds_and_groups_do_not(tmp_path):
    run, config = prepared(tmp_path)
    rows = scored(run, config, pipes(config))
    seeds = [tuple(game["seed"] for game in row["games"]) for row in rows]
    assert seeds[0] == seeds[1] == seeds[2]
    assert seeds[4] == seeds[6] == seeds[7]
    assert not set(seeds[0]) & set(seeds[4])
    assert len(seeds[0]) == 3
    task = registry.get("game2048", config.task.option_values())
    assert seeds[0] == tuple(task.training_seeds(0, 0, 0))


def test_the_same_program_on_the_same_seeds_is_judged_once_and_scores_the_same(tmp_path):
    run, config = prepared(tmp_path)
    pool = pipes(config)
    rows = scored(run, config, pool)
    assert len(pool.jobs) == 5  # of 8: one has no program, and each group holds one program twice
    assert {**rows[0], "completion_id": ""} == {**rows[2], "completion_id": ""}
    assert rows[0]["games"] != rows[6]["games"]


def test_the_letters_and_the_seed_of_a_game_replay_it(tmp_path):
    from stages.tasks.game2048.rules import Game

    run, config = prepared(tmp_path)
    (game, *_) = scored(run, config, pipes(config))[0]["games"]
    replayed = Game(game["seed"], size=4, target=2048, max_moves=60)
    for letter in game["letters"].encode():
        replayed.play(letter)
    record = replayed.record()
    for name in ("moves", "max_tile", "score"):
        assert record[name] == game[name]


def test_a_stage_killed_between_verdicts_goes_on_and_ends_with_the_same_bytes(tmp_path):
    whole, config = prepared(tmp_path / "whole")
    scored(whole, config, pipes(config))
    run, config = prepared(tmp_path / "killed")
    with pytest.raises(RuntimeError, match="broke"):
        scored(run, config, pipes(config, fail_after=3))
    assert run.manifest(StageId("score", 0)) is None
    pool = pipes(config)
    scored(run, config, pool)
    assert len(pool.jobs) == 5 - 3
    assert run.manifest(StageId("score", 0)).digest == whole.manifest(StageId("score", 0)).digest
    assert not list(run.folder(StageId("score", 0)).glob("*.journal"))


def test_a_sandbox_that_fails_is_never_a_reward(tmp_path):
    run, config = prepared(tmp_path)
    with pytest.raises(RuntimeError, match="the sandbox broke"):
        scored(run, config, pipes(config, fail_after=0))
    assert not run.folder(StageId("score", 0)).exists()


def test_progress_counts_completions_and_tells_the_mean_reward(tmp_path):
    run, config = prepared(tmp_path)
    seen = []
    rows = scored(run, config, pipes(config), seen.append)
    assert [(progress.done, progress.total) for progress in seen] == [(done, 8) for done in range(9)]
    mean = sum(row["reward"] for row in rows) / 8
    assert seen[-1].fields["mean reward"] == pytest.approx(mean, abs=1e-3)


def test_limits_the_sandbox_cannot_keep_are_an_error_of_the_user():
    with pytest.raises(UserError, match="memory"):
        judging.limits_of(SandboxConfig(memory_bytes=2**20))


def test_the_stage_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, stages.score; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)


@pytest.mark.docker
def test_real_sandboxes_give_the_verdicts_of_the_pipes_and_catch_what_the_pipes_let_pass(tmp_path):
    completions = [*COMPLETIONS, CRASHES, FOREIGN, LOOPS, CHEATS]
    behind_pipes, config = prepared(tmp_path / "pipes")
    expected = scored(behind_pipes, config, pipes(config))
    run, config = prepared(tmp_path / "docker", completions)
    with Session() as session:
        execute(run, config, StageId("score", 0), score.run, session)
    rows = read_table(run.folder(StageId("score", 0)), "scores", tables.scores(registry.get("game2048"))).to_pylist()
    for row, same in zip(rows, expected, strict=False):
        if row["outcome"] == "ok":
            assert row == same | {name: row[name] for name in checks.COLUMNS}
            assert row["depends_on_time"] is False
    crashes, foreign, loops, cheats = rows[8:]
    assert [row["outcome"] for row in rows[8:11]] == ["crash", "foreign_import", "timeout"]
    assert crashes["reward"] < rows[1]["reward"]
    assert foreign["reward"] == -5
    assert {game["state"] for game in loops["games"]} == {"timeout"}
    assert {game["moves"] > 5 for game in loops["games"]} == {True}
    assert loops["reward"] > rows[1]["reward"]
    assert cheats["reward"] < rows[0]["reward"]
    assert all(game["state"] != "won" for game in cheats["games"])
    again, config = prepared(tmp_path / "again", completions)
    with Session() as session:
        execute(again, config, StageId("score", 0), score.run, session)
    assert again.manifest(StageId("score", 0)).digest == run.manifest(StageId("score", 0)).digest


@pytest.mark.docker
def test_containers_killed_in_mid_run_lose_no_verdict_and_double_none(tmp_path):
    """Every container that lives is killed with SIGKILL, twice; the verdicts are those of a quiet run."""
    slow = "def strategy(board):\n    for _ in range(40000): pass\n    return 'AWDS'[sum(map(sum, board)) // 2 % 4]\n"
    completions = [f"{FINAL}```python\n{slow}# {number}\n```<|return|>" for number in range(16)]
    quiet, config = prepared(tmp_path / "quiet", completions)
    with Session() as session:
        execute(quiet, config, StageId("score", 0), score.run, session)
    run, config = prepared(tmp_path / "killed", completions)
    counts, killed, killers = [], [], []
    with Session() as session:
        task = registry.of(config)
        pool = session.get(
            "sandbox",
            lambda: judging.open_pool(
                config.sandbox, harnesses={task.name: task.harness_source()}, labels=run.labels()
            ),
        )

        def kill():
            client = connect()
            for container in client.containers(filters={"label": [f"{k}={v}" for k, v in run.labels().items()]}):
                client.kill(container["Id"], signal="SIGKILL")
                killed.append(container["Id"])
            client.close()

        def report(progress):
            counts.append(progress.done)
            if progress.done in (2, 9):
                killers.append(threading.Thread(target=kill))
                killers[-1].start()

        execute(run, config, StageId("score", 0), score.run, session, report)
        for killer in killers:
            killer.join()
        assert len(set(killed)) == len(killed) >= 2
        assert pool.num_started > 2
    assert counts == list(range(17))  # each verdict journalled once
    assert run.manifest(StageId("score", 0)).digest == quiet.manifest(StageId("score", 0)).digest
