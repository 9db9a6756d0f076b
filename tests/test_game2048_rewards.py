"""The rewards of 2048: numbers by hand, and the orders that keep a model from gaming them."""

import itertools
import math
import random

import pytest

from stages.config import UserError
from stages.sandbox.protocol import Limits, Outcome, Result
from stages.tasks import registry
from stages.tasks.game2048.rules import Game
from stages.tasks.game2048.task import Game2048


def result(outcome, *games):
    return Result(job_id="j", outcome=outcome, detail="why", cases=games, cpu_s=0.1, wall_s=0.2)


def game(score=0, max_tile=2, state="stuck"):
    return {"seed": 2, "moves": 1, "max_tile": max_tile, "score": score, "state": state, "letters": "A"}


def rewards(outcome, *games):
    return Game2048().score(result(outcome, *games)).rewards


def test_the_known_good_answers_score_what_they_must():
    Game2048().validate()
    registry.get("game2048", {"size": 6, "target": 4096}).validate()


def test_the_grade_of_a_game_is_the_documented_formula():
    graded = rewards(Outcome.ok, game(score=1024, max_tile=128), game(score=20480, max_tile=2048, state="won"))
    lost = 7 / 11 + 8 * 1024 / 20480
    assert graded == {"works": 1.0, "no_cheating": 0.0, "strategy": pytest.approx((lost + 1 + 8 + 4) / 2)}


def test_the_reward_is_the_sum_of_its_columns():
    score = Game2048().score(result(Outcome.ok, game(score=4, max_tile=4)))
    assert score.reward == pytest.approx(sum(score.rewards.values()))
    assert tuple(score.rewards) == Game2048.reward_names
    assert score.detail == "why"


@pytest.mark.parametrize(
    ("outcome", "works"),
    [("ok", 1), ("timeout", 1), ("crash", 0), ("memory", 0), ("output_limit", 0), ("syntax_error", -1)],
)
def test_works_says_how_far_the_program_got(outcome, works):
    graded = rewards(Outcome(outcome))
    assert (graded["works"], graded["no_cheating"], graded["strategy"]) == (works, 0, 0)


def test_every_outcome_has_a_finite_reward_and_no_program_has_one_too():
    assert all(math.isfinite(Game2048().score(result(outcome)).reward) for outcome in Outcome)
    nothing = Game2048().score(None)
    assert (nothing.outcome, nothing.reward, nothing.cases) == (Outcome.no_program, -1.0, [])


@pytest.mark.parametrize("outcome", [Outcome.cheat, Outcome.foreign_import])
def test_a_cheat_scores_below_everything_else_whatever_its_games_say(outcome):
    cheat = Game2048().score(result(outcome, game(score=20480, max_tile=2048, state="won"))).reward
    honest = [
        Game2048().score(result(other)).reward
        for other in Outcome
        if other not in (Outcome.cheat, Outcome.foreign_import)
    ]
    assert cheat == -5
    assert cheat < min(honest)


def test_playing_on_never_lowers_the_grade_and_every_merge_raises_it():
    task = Game2048()
    for seed in range(20):
        choose = random.Random(seed)
        played = Game(seed, size=4, target=64, max_moves=5000)
        grades = [(0, task.grade(dict(played.record(), state="illegal")))]
        while not played.state:
            played.play(choose.choice(b"WASD"))
            grades.append((played.score, task.grade(dict(played.record(), state=played.state or "illegal"))))
        for (score, grade), (next_score, next_grade) in itertools.pairwise(grades):
            assert next_grade > grade if next_score > score else next_grade >= grade


def test_quitting_at_once_scores_below_losing_after_any_merge():
    quits = rewards(Outcome.ok, game(max_tile=4, state="illegal"))["strategy"]
    assert quits < rewards(Outcome.ok, game(score=4, max_tile=4))["strategy"]


@pytest.mark.parametrize("state", ["timeout", "illegal", "move_limit", "stuck"])
def test_how_a_game_is_lost_does_not_matter_to_its_grade(state):
    assert rewards(Outcome.ok, game(score=800, max_tile=64, state=state)) == rewards(
        Outcome.ok, game(score=800, max_tile=64)
    )


def test_running_out_of_time_costs_no_more_than_losing_at_the_same_board():
    board = {"score": 800, "max_tile": 64}
    timeout = Game2048().score(result(Outcome.timeout, game(**board, state="timeout"))).reward
    assert timeout == Game2048().score(result(Outcome.ok, game(**board, state="stuck"))).reward


def test_a_win_beats_any_game_that_was_not_won():
    best_loss = rewards(Outcome.ok, game(score=25_000, max_tile=1024))["strategy"]
    least_win = rewards(Outcome.ok, game(score=18_000, max_tile=2048, state="won"))["strategy"]
    assert best_loss + 0.5 < least_win <= 13


def test_a_program_that_dies_scores_below_one_that_quits_and_above_one_that_does_not_parse():
    at_start = game(max_tile=4, state="illegal")
    dies, quits, broken = (
        Game2048().score(result(outcome, at_start)).reward
        for outcome in (Outcome.crash, Outcome.ok, Outcome.syntax_error)
    )
    broken = Game2048().score(result(Outcome.syntax_error)).reward
    assert broken < dies < quits


def test_every_completion_of_a_group_meets_the_same_hidden_seeds_and_no_two_groups_do():
    task = registry.get("game2048", {"games": 6})
    drawn = [tuple(task.training_seeds(0, iteration, group)) for iteration in range(5) for group in range(4)]
    assert drawn[0] == tuple(task.training_seeds(0, 0, 0))
    assert len({seed for seeds in drawn for seed in seeds}) == 5 * 4 * 6
    assert task.training_seeds(1, 0, 0) != task.training_seeds(0, 0, 0)


def test_held_out_seeds_are_never_training_seeds():
    task = Game2048()
    assert all(seed % 2 == 1 for seed in task.held_out_seeds(500))
    assert all(seed % 2 == 0 for iteration in range(50) for seed in task.training_seeds(3, iteration, 1))
    assert task.held_out_seeds(500)[:64] == task.held_out_seeds(64)
    assert len(set(task.held_out_seeds(500))) == 500
    assert all(0 <= seed < 1 << 63 for seed in task.held_out_seeds(100))


def test_a_job_carries_the_games_and_a_seed_for_the_program_that_is_none_of_theirs():
    task = registry.get("game2048", {"size": 5, "target": 512})
    job = task.job("00000-000-000", "def strategy(board): ...", [4, 6], Limits())
    assert [case["seed"] for case in job.cases] == [4, 6]
    assert {(case["size"], case["target"], case["max_moves"]) for case in job.cases} == {(5, 512, 5000)}
    (program_seed,) = {case["program_seed"] for case in job.cases}
    assert program_seed not in (4, 6)
    assert program_seed != task.job("x", "", [4, 8], Limits()).cases[0]["program_seed"]
    assert (job.entry, job.harness) == ("strategy", "game2048")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 2}, "task.size is 2"),
        ({"target": 1000}, "task.target is 1000"),
        ({"games": 0}, "task.games is 0"),
        ({"max_moves": 0}, "task.max_moves is 0"),
        ({"sise": 4}, "task.sise"),
        ({"size": "4"}, "task.size is '4'"),
        ({"size": True}, "task.size is True"),
    ],
)
def test_wrong_options_are_refused_by_name_and_with_a_hint(options, says):
    with pytest.raises(UserError, match=says) as caught:
        registry.get("game2048", options)
    assert caught.value.hint
