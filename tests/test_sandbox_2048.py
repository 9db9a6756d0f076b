"""2048 in the real sandbox: the games are those that the program plays in this process, and cheats gain nothing."""

import random
from collections.abc import Iterator

import pytest

from stages.config import SandboxConfig
from stages.sandbox import Limits, Outcome, Result, SandboxPool, open_pool
from stages.tasks import registry
from stages.tasks.game2048.rules import Game
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.docker

SEEDS = (3, 14, 15, 92, 65, 35)
LIMITS = Limits(cpu_s=20)
TASK = registry.get("game2048", {})


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    harnesses = {TASK.name: TASK.harness_source()}
    with open_pool(SandboxConfig(containers=1), harnesses=harnesses, labels={"flexsink.run": "test-2048"}) as opened:
        yield opened


def judged(pool: SandboxPool, program: str, seeds: tuple[int, ...] = SEEDS) -> Result:
    return pool.submit(TASK.job("test", program, seeds, LIMITS)).result(timeout=PATIENCE_S)


def played_here(program: str, case: dict) -> dict:
    """Plays one game of a deterministic program with the rules alone: no harness, no pipe."""
    names: dict = {}
    exec(program, names)
    game = Game(case["seed"], size=case["size"], target=case["target"], max_moves=case["max_moves"])
    while not game.state:
        rows = [[1 << cell if cell else 0 for cell in game.board[start : start + 4]] for start in (0, 4, 8, 12)]
        game.play(ord(names["strategy"](rows)))
    return game.record()


def test_the_greedy_baseline_plays_the_games_it_plays_outside(pool: SandboxPool) -> None:
    program = TASK.baselines()["greedy"]
    result = judged(pool, program)
    assert result.outcome is Outcome.ok
    cases = TASK.job("test", program, SEEDS, LIMITS).cases
    assert list(result.cases) == [played_here(program, case) for case in cases]
    assert sum(row["moves"] for row in result.cases) > 300


def test_a_program_that_draws_lots_plays_the_same_games_again(pool: SandboxPool) -> None:
    program = "import random\ndef strategy(board):\n    return random.choice('WASD')\n"
    first = judged(pool, program)
    again = judged(pool, program)
    assert first.outcome is Outcome.ok
    assert first.cases == again.cases
    assert judged(pool, program, tuple(random.Random(1).sample(range(999), 6))).cases != first.cases


def test_writing_2048_into_the_board_wins_nothing(pool: SandboxPool) -> None:
    honest = "def strategy(board):\n    return 'A'\n"
    cheat = "def strategy(board):\n    for row in board:\n        row[:] = [2048] * 4\n    return 'A'\n"
    assert judged(pool, cheat).cases == judged(pool, honest).cases


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("def strategy(board):\n    while True: pass\n", Outcome.timeout),
        ("def strategy(board):\n    raise SystemExit\n", Outcome.crash),
        ("def strategy(board):\n    import os\n", Outcome.foreign_import),
    ],
)
def test_a_program_that_ends_early_has_no_game_won(pool: SandboxPool, program: str, outcome: Outcome) -> None:
    job = TASK.job("test", program, SEEDS, Limits(cpu_s=0.3, wall_s=20))
    result = pool.submit(job).result(timeout=PATIENCE_S)
    assert result.outcome is outcome
    assert all(row["state"] != "won" for row in result.cases)


@pytest.mark.timed
def test_supervisor_pipe_and_rules_use_at_most_twice_20_us_a_move(pool: SandboxPool) -> None:
    program = "import random\ndef strategy(board):\n    return random.choice('WASD')\n"
    result = judged(pool, program, tuple(range(64)))
    moves = sum(row["moves"] for row in result.cases)
    print(f"\nsupervisor with the 2048 rules: {1e6 * result.supervisor_cpu_s / moves:.1f} us a move over {moves} moves")
    assert result.supervisor_cpu_s / moves < 2 * 20e-6
