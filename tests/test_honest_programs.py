"""Honest programs, odd but legal ones among them: none is refused or disturbed, and each plays the games that it plays
outside the sandbox, move by move."""

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from stages.sandbox import Limits, Outcome, Result
from stages.tasks import registry
from tests.honest_programs import Honest, load, played
from tests.patience import PATIENCE_S
from tests.sandbox_backends import BACKENDS, opened

TASK = registry.get("game2048", {"target": 64, "max_moves": 60})
SEEDS = (11, 2048, 31337)
LIMITS = Limits(cpu_s=20, wall_s=300)
PROGRAMS = load()
MANY_FUNCTIONS = "".join(f"def helper_{n}(x):\n    '''Adds {n}.'''\n    return x + {n}\n\n" for n in range(400))
LONG_PROGRAMS = [
    Honest("400-functions", MANY_FUNCTIONS + "def strategy(board):\n    return 'WASD'[helper_7(board[0][0]) % 4]\n"),
    Honest("200-kb-of-comments", "# " + "x" * 200_000 + "\ndef strategy(board):\n    return 'A'\n"),
    Honest(
        "5000-numbers-in-a-table",
        f"TABLE = {[n * n % 11 for n in range(5000)]}\n"
        "def strategy(board):\n    return 'WASD'[TABLE[sum(map(sum, board))] % 4]\n",
    ),
    Honest(
        "a-chain-of-300-branches",
        "def strategy(board):\n    n = sum(map(sum, board))\n"
        + "".join(f"    {'el' * (n > 0)}if n == {n}:\n        return {'WASD'[n // 2 % 4]!r}\n" for n in range(300))
        + "    return 'A'\n",
    ),
]


@pytest.fixture(scope="module", params=BACKENDS)
def verdicts(request: pytest.FixtureRequest) -> Iterator[dict[str, "Future[Result]"]]:
    """The verdicts on all programs, judged beside one another."""
    harnesses = {TASK.name: TASK.harness_source()}
    with opened(request.param, harnesses=harnesses, run="test-honest", containers=2) as pool:
        jobs = {one.name: TASK.job(one.name, one.program, SEEDS, LIMITS) for one in PROGRAMS + LONG_PROGRAMS}
        yield {name: pool.submit(job) for name, job in jobs.items()}


@pytest.mark.parametrize("honest", PROGRAMS + LONG_PROGRAMS, ids=lambda honest: honest.name)
def test_an_honest_program_plays_the_games_that_it_plays_outside(
    verdicts: dict[str, "Future[Result]"], honest: Honest
) -> None:
    result = verdicts[honest.name].result(timeout=PATIENCE_S)
    assert (result.outcome, result.detail) == (Outcome.ok, "")
    expected = played(honest.program, TASK.job("expected", honest.program, SEEDS, LIMITS).cases)
    assert list(result.cases) == expected


def test_there_are_200_honest_programs_and_no_two_alike() -> None:
    assert len(PROGRAMS) >= 200
    assert len({one.name for one in PROGRAMS}) == len({one.program for one in PROGRAMS}) == len(PROGRAMS)


def test_the_programs_reach_every_end_that_a_game_can_have() -> None:
    by_name = {one.name: one.program for one in PROGRAMS}
    chosen = ("always-left", "expectimax-two-deep", "first-legal", "returns-none-in-the-end")
    cases = TASK.job("expected", "", SEEDS, LIMITS).cases
    states = {game["state"] for name in chosen for game in played(by_name[name], cases)}
    assert {"illegal", "won", "move_limit"} <= states
