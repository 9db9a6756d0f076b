"""The 2048 task: the model writes `strategy(board)`, the sandbox plays it on hidden seeds, better play earns more.

Each reward is a column of its own; the reward is their sum.
    works        1 if the program played or ran out of time, 0 if it died (crash, memory, output) or cheated, -1 if
                 there was none or it does not parse
    no_cheating  -5 for an import that is not allowed or a forbidden act, else 0
    strategy     mean over the games of
                     log(max_tile) / log(target) + 8 s + (4 if won)
                 with s = score / (target (log2(target) - 1)), the score of building one target tile out of twos; 0 for
                 a cheat
A game counts where it stands when it ends, however it ended: playing on never lowers its grade and every merge raises
it, so quitting never beats playing, and running out of time costs what losing costs. The score counts as it is, not its
logarithm: among programs that work the better one must stand out from its group as clearly as a broken one does. On 4x4
a program that quits at once gets about 0.1, the baselines 1 to 2.7, a win 13.

Not covered: how the model came to its program; programs that look at the clock are the sandbox's to stop.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from stages.artifacts.seeds import derive
from stages.config import UserError
from stages.sandbox.protocol import Job, Limits, Outcome, Result
from stages.tasks.base import Figure, Score, Tally, Task
from stages.tasks.game2048.baselines import BASELINES

TEMPLATE = """\
Write a Python function strategy(board: list[list[int]]) -> str that plays 2048 on a {size}x{size} board \
and reaches {target}. board holds rows of numbers, 0 is empty. \
Return the next move: 'W' up, 'A' left, 'S' down or 'D' right. \
A move that changes nothing is wasted. \
Import only math, random, itertools, collections, functools, heapq, copy or typing. \
Answer with one fenced python code block that holds the function."""

PROMPT = TEMPLATE.format(size=4, target=2048)

_RULES_IMPORT = "from stages.tasks.game2048.rules import Game\n"


@dataclasses.dataclass(frozen=True)
class Options:
    """The `task.` keys of 2048."""

    size: int = 4  # cells a side, 3 to 8
    target: int = 2048  # the tile that wins, a power of two
    games: int = 4  # hidden seeds a completion is judged on
    max_moves: int = 5000  # moves after which a game is over

    def __post_init__(self) -> None:
        if not 3 <= self.size <= 8:
            raise UserError(f"task.size is {self.size}", "a 2048 board has 3 to 8 cells a side")
        if not 8 <= self.target <= 1 << 17 or self.target & (self.target - 1):
            raise UserError(f"task.target is {self.target}", "a target is a power of two from 8 to 131072")
        if not 1 <= self.games <= 1000:
            raise UserError(f"task.games is {self.games}", "a completion is judged on 1 to 1000 games")
        if not 1 <= self.max_moves <= 100_000:
            raise UserError(f"task.max_moves is {self.max_moves}", "a game has 1 to 100000 moves")


class Game2048(Task):
    name = "game2048"
    entry = "strategy"
    reward_names = ("works", "no_cheating", "strategy")
    cases, player = "games", "player"
    meet, met = "play", "played"
    # state: won | stuck | illegal | move_limit | timeout; letters: the moves in order, one of W A S D each
    case_columns: ClassVar = {
        "seed": "int64",
        "moves": "int32",
        "max_tile": "int32",
        "score": "int64",
        "state": "string",
        "letters": "string",
    }
    recording = "letters"
    good_states = ("won",)
    figures = (
        Figure("mean_score", "mean score", unit="2048 points per game", stream="score"),
        Figure("win_rate", "games won", unit="share of games", share=True, short="won", counted="wins", stream="wins"),
    )
    tally = Tally("tiles", of="max_tile", value="tile", title="largest tile")

    options_type = Options

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self.title = f"2048 on a {self.options.size}x{self.options.size} board, up to {self.options.target}"

    def prompt(self) -> str:
        return TEMPLATE.format(size=self.options.size, target=self.options.target)

    def harness_source(self) -> str:
        folder = Path(__file__).parent
        rules, harness = ((folder / name).read_text(encoding="utf-8") for name in ("rules.py", "harness.py"))
        assert _RULES_IMPORT in harness
        return rules + "\n\n" + harness.replace(_RULES_IMPORT, "")

    def job(self, job_id: str, program: str, seeds: Sequence[int], limits: Limits) -> Job:
        shared = {
            "size": self.options.size,
            "target": self.options.target,
            "max_moves": self.options.max_moves,
            "program_seed": derive("game2048", "program", *seeds),
        }
        cases = tuple({"seed": seed, **shared} for seed in seeds)
        return Job(job_id=job_id, program=program, entry=self.entry, harness=self.name, cases=cases, limits=limits)

    def grade(self, game: Mapping[str, Any]) -> float:
        """Returns what one game is worth: the formula at the top of this file."""
        levels = math.log2(self.options.target)
        share = game["score"] / (self.options.target * (levels - 1))
        built = math.log2(game["max_tile"]) / levels + 8 * share
        return built + (4.0 if game["state"] == "won" else 0.0)

    def score(self, result: Result | None) -> Score:
        if result is None:
            rewards = {"works": -1.0, "no_cheating": 0.0, "strategy": 0.0}
            return Score(Outcome.no_program, rewards, [], "the final channel holds no program")
        cheated = result.outcome in (Outcome.cheat, Outcome.foreign_import)
        works = {Outcome.ok: 1.0, Outcome.timeout: 1.0, Outcome.no_program: -1.0, Outcome.syntax_error: -1.0}
        grades = [] if cheated else [self.grade(game) for game in result.cases]
        rewards = {
            "works": works.get(result.outcome, 0.0),
            "no_cheating": -5.0 if cheated else 0.0,
            "strategy": sum(grades) / len(grades) if grades else 0.0,
        }
        return Score(result.outcome, rewards, list(result.cases), result.detail)

    def measure(self, cases: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Returns the mean points of the games and the share of them won, zeros without a game."""
        if not cases:
            return {"mean_score": 0.0, "win_rate": 0.0}
        points, wins = (game["score"] for game in cases), (game["state"] == "won" for game in cases)
        return {"mean_score": sum(points) / len(cases), "win_rate": sum(wins) / len(cases)}

    def describe(self, cases: Sequence[Mapping[str, Any]]) -> str:
        best = max(cases, key=lambda game: game["score"])
        score, moves = (f"{best[name]:,}".replace(",", "\u202f") for name in ("score", "moves"))
        return (
            f"{len(cases)} games, best: score {score}, largest tile {best['max_tile']}, "
            f"{best['state'].replace('_', ' ')} after {moves} moves"
        )

    def baselines(self) -> Mapping[str, str]:
        return BASELINES

    def validate(self) -> None:
        def verdict(outcome: Outcome, **game: Any) -> float:
            cases = ({"seed": 2, "moves": 1, "letters": "A", **game},) if game else ()
            return self.score(
                Result(job_id="validate", outcome=outcome, detail="", cases=cases, cpu_s=0.0, wall_s=0.0)
            ).reward

        target = self.options.target
        full = target * (target.bit_length() - 2)
        start: dict[str, Any] = {"max_tile": 2, "score": 0}
        later: dict[str, Any] = {"max_tile": 4, "score": 4}
        won = verdict(Outcome.ok, max_tile=target, score=full, state="won")
        assert abs(won - 14.0) < 1e-9, f"a win with nothing to spare scores {won}, not 1 + 1 + 8 + 4"
        quits, loses = verdict(Outcome.ok, state="illegal", **start), verdict(Outcome.ok, state="stuck", **later)
        assert quits < loses < won, f"quitting {quits}, losing {loses}, winning {won}"
        assert verdict(Outcome.timeout, state="timeout", **later) == loses, (
            "running out of time costs what losing costs"
        )
        assert verdict(Outcome.crash, state="illegal", **start) < quits, (
            "a crash scores below a legal end at the same board"
        )
        empty = self.score(None).reward
        assert verdict(Outcome.cheat, state="won", max_tile=target, score=full) < empty < quits, "cheating pays"
