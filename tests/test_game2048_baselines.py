"""The baselines, judged as the model's programs are.

Means of 400 games each on 4x4, seeds 0-399, target 2048 (python tests/test_game2048_baselines.py):

    random       mean   1069  sd   496  moves  117  >=256/512/1024/2048: [5.5, 0.0, 0.0, 0.0] %
    fixed_order  mean   2233  sd  1058  moves  203  >=256/512/1024/2048: [47.75, 2.0, 0.0, 0.0] %
    greedy       mean   2995  sd  1494  moves  253  >=256/512/1024/2048: [60.25, 12.5, 0.0, 0.0] %
    look_ahead   mean   4753  sd  2123  moves  361  >=256/512/1024/2048: [88.5, 38.0, 2.75, 0.0] %
"""

import statistics
import sys

import pytest

from stages.tasks.game2048.baselines import BASELINES
from stages.tasks.game2048.task import Game2048
from tests.program_pipes import judge


def play(name, *, games):
    namespace = {"__name__": "harness"}
    exec(compile(Game2048().harness_source(), "<harness>", "exec"), namespace)
    job = Game2048().job("baseline", BASELINES[name], range(games), None)
    return judge(namespace, job.program, job.cases)


@pytest.fixture(scope="module")
def played():
    return {name: play(name, games=60) for name in BASELINES}


def test_every_baseline_plays_every_game_until_it_is_stuck_or_has_won(played):
    for name, games in played.items():
        assert {game["state"] for game in games} <= {"stuck", "won"}, name


def test_the_baselines_are_ordered_as_their_means_of_400_games_are(played):
    means = {name: statistics.mean(game["score"] for game in games) for name, games in played.items()}
    assert list(means) == ["random", "fixed_order", "greedy", "look_ahead"]
    assert means["random"] * 1.5 < means["fixed_order"] < means["greedy"] < means["look_ahead"] / 1.3


def test_the_first_legal_letter_lasts_as_long_as_in_another_implementation(played):
    """60 games of another implementation lasted 209 moves on average and won none."""
    moves = [game["moves"] for game in played["fixed_order"]]
    error = statistics.stdev(moves) / len(moves) ** 0.5
    assert abs(statistics.mean(moves) - 209) < 3 * 2**0.5 * error
    assert all(game["max_tile"] < 2048 for game in played["fixed_order"])


def test_better_baselines_earn_more(played):
    task = Game2048()
    earned = [statistics.mean(task.grade(game) for game in played[name]) for name in BASELINES]
    assert earned == sorted(earned)
    assert 0.9 < earned[0] < earned[-1] < 3


if __name__ == "__main__":
    for name in BASELINES:
        games = play(name, games=400)
        scores = [game["score"] for game in games]
        tiles = [sum(game["max_tile"] >= tile for game in games) / 4 for tile in (256, 512, 1024, 2048)]
        line = f"{name:12} mean {statistics.mean(scores):6.0f}  sd {statistics.stdev(scores):5.0f}"
        line += f"  moves {statistics.mean(game['moves'] for game in games):4.0f}  >=256/512/1024/2048: {tiles} %"
        sys.stdout.write(f"    {line}\n")
