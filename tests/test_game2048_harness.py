"""The harness of 2048 as it is shipped: its text alone, a forked child, a pair of pipes."""

import time

import pytest

from stages.tasks.game2048.rules import Game
from stages.tasks.game2048.task import Game2048
from tests.program_pipes import Ended, judge, program_process

FIXED_LEFT_UP = """
def strategy(board):
    return "AWDS"[sum(map(sum, board)) // 2 % 4]
"""


def cases(*seeds, size=4, target=2048, max_moves=5000, program_seed=5):
    shared = {"size": size, "target": target, "max_moves": max_moves, "program_seed": program_seed}
    return [{"seed": seed, **shared} for seed in seeds]


@pytest.fixture(scope="module")
def harness():
    namespace = {"__name__": "harness"}
    exec(compile(Game2048().harness_source(), "<harness>", "exec"), namespace)
    return namespace


def test_the_shipped_text_stands_alone_and_imports_the_standard_library_only():
    source = Game2048().harness_source()
    imports = [line for line in source.splitlines() if line.strip().startswith(("import ", "from "))]
    assert [line.strip() for line in imports] == ["import random", "import functools", "import random"]
    assert source.isascii()


@pytest.mark.parametrize("size", [3, 4, 5, 8])
def test_games_in_lockstep_equal_games_played_one_by_one_against_the_rules(harness, size):
    together = judge(harness, FIXED_LEFT_UP, cases(*range(20), size=size, target=1 << 17, max_moves=200))
    alone = [
        judge(harness, FIXED_LEFT_UP, cases(seed, size=size, target=1 << 17, max_moves=200))[0] for seed in range(20)
    ]
    assert together == alone
    namespace = {}
    exec(FIXED_LEFT_UP, namespace)
    for seed, record in enumerate(together):
        game = Game(seed, size=size, target=1 << 17, max_moves=200)
        while not game.state:
            board = [
                [1 << cell if cell else 0 for cell in game.board[row : row + size]] for row in range(0, size**2, size)
            ]
            game.play(ord(namespace["strategy"](board)))
        assert game.record() == record
    assert sum(record["moves"] for record in together) > 200


def test_a_program_that_writes_on_its_board_or_keeps_it_reaches_no_game(harness):
    hostile = """
kept = []
def strategy(board):
    letter = "AWDS"[sum(map(sum, board)) // 2 % 4]
    kept.append(board)
    for old in kept:
        for row in old:
            row[:] = [2048] * 9
        old.append([2048])
    board.clear()
    return letter
"""
    assert judge(harness, hostile, cases(1, 2, 3)) == judge(harness, FIXED_LEFT_UP, cases(1, 2, 3))


@pytest.mark.parametrize(
    "answer",
    [
        "None",
        "'w'",
        "'WA'",
        "''",
        "87",
        "b'W'",
        "['W']",
        "'up'",
        "True",
        "2.0",
        "type('S', (str,), {})('W')",
        "'W\\x00'",
        "object()",
    ],
)
def test_anything_but_one_of_the_four_letters_ends_the_game_as_illegal(harness, answer):
    (game,) = judge(harness, f"def strategy(board):\n    return {answer}\n", cases(7))
    assert (game["state"], game["moves"], game["score"]) == ("illegal", 0, 0)


def test_one_game_that_ends_does_not_end_the_others(harness):
    program = """
import random
def strategy(board):
    return random.choice("WASD") if sum(map(sum, board)) < 40 else None
"""
    games = judge(harness, program, cases(*range(12)))
    assert {game["state"] for game in games} == {"illegal"}
    assert len({game["moves"] for game in games}) > 1
    assert max(game["moves"] for game in games) > 12


def test_a_program_that_dies_leaves_its_games_where_they_stood(harness):
    program = """
calls = 0
def strategy(board):
    global calls
    calls += 1
    if calls == 61:
        raise KeyError("sixty-one")
    return "AWDS"[sum(map(sum, board)) // 2 % 4]
"""
    games = judge(harness, program, cases(1, 2, 3))
    assert [game["state"] for game in games] == ["illegal"] * 3
    full = judge(harness, FIXED_LEFT_UP, cases(1, 2, 3))
    assert all(whole["letters"].startswith(game["letters"]) for game, whole in zip(games, full, strict=True))
    assert all(15 < game["moves"] <= 20 for game in games)


def test_running_out_of_time_keeps_the_games_and_says_timeout(harness):
    questions = []

    def ask(question):
        questions.append(question)
        if len(questions) == 30:
            raise Ended("timeout")
        return b"AWDS"[len(questions) % 4 :][:1] * 2

    games = harness["judge"](cases(1, 2), ask)
    assert [game["state"] for game in games] == ["timeout", "timeout"]
    assert all(game["moves"] > 5 for game in games)


def test_a_failure_of_the_sandbox_is_not_taken_for_the_end_of_a_program(harness):
    def ask(question):
        raise ConnectionError("the pipe broke")

    with pytest.raises(ConnectionError):
        harness["judge"](cases(1), ask)


@pytest.mark.parametrize("answer", [b"", b"A", b"AAA"])
def test_an_answer_of_the_wrong_length_ends_every_game(harness, answer):
    games = harness["judge"](cases(1, 2), lambda question: answer)
    assert [(game["state"], game["moves"]) for game in games] == [("illegal", 0)] * 2


def test_a_program_that_draws_random_numbers_gets_the_same_verdict_again_and_another_one_from_another_seed(harness):
    program = "import random\ndef strategy(board):\n    return random.choice('WASD')\n"
    first = judge(harness, program, cases(1, 2, 3))
    assert judge(harness, program, cases(1, 2, 3)) == first
    assert judge(harness, program, cases(1, 2, 3, program_seed=6)) != first


def test_the_question_tells_nothing_but_the_boards(harness):
    """Games that differ in their seed but not yet in their boards ask the same question."""
    asked = {}
    for seed in range(400):

        def ask(question, seed=seed):
            asked.setdefault(question, []).append(seed)
            return b"\0"

        harness["judge"](cases(seed), ask)
    assert any(len(seeds) > 1 for seeds in asked.values())
    assert {len(question) for question in asked} == {9 + 16}


@pytest.mark.timed
def test_a_board_costs_little_in_the_harness_beside_the_strategy(harness):
    """The supervisor and the pipe may use 20 us of CPU a move; this is the supervisor's side, rules included."""
    program = "def strategy(board):\n    return 'AWDS'[board[0][0] % 3 + (board[1][1] == board[2][2])]\n"
    best = 1.0
    for _ in range(3):
        with program_process(harness, program) as ask:
            start = time.process_time()
            games = harness["judge"](cases(*range(40)), ask)
            moves = sum(game["moves"] for game in games)
            best = min(best, (time.process_time() - start) / moves)
    assert best < 20e-6
