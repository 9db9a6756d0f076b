"""What a task is to the stages: prompts and seeds going in, a job for the sandbox, a score coming out.

A task of your own is a subclass of Task with a name, a title, an entry, three rewards, the columns of a case, `prompt`
and `grade`, and a harness.py beside it; all else has a default. README.md has one, tests/examples/coins another.
"""

import abc
import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from stages.artifacts.seeds import derive
from stages.sandbox.protocol import Job, Limits, Outcome, Result
from stages.tasks import programs


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What one group answers.

    Example: Prompt("00003-002", ({"role": "user", "content": "Write a Python function ..."},))
    """

    prompt_id: str
    messages: tuple[dict[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number that says how good a held-out program is: a column of the evaluations, with an interval in the summary.

    A share is shown in per cent. `short` is its name where room is scarce, `counted` in a line of text; `stream` names
    the random numbers of its bootstrap, the figure's own name if empty.

    Example: Figure("win_rate", "games won", unit="share of games", share=True, short="won", counted="wins")
    """

    name: str
    title: str
    unit: str
    digits: int = 0
    share: bool = False
    short: str = ""
    counted: str = ""
    stream: str = ""


@dataclasses.dataclass(frozen=True)
class Tally:
    """A histogram over cases in the summary's column `name`: how many cases have each value of the case column `of`.

    Example: Tally("tiles", of="max_tile", value="tile", title="largest tile")
    """

    name: str
    of: str
    value: str
    title: str


@dataclasses.dataclass(frozen=True)
class Score:
    """The verdict on one completion; `reward` is the sum of its reward functions. cases: what the judge found, case by
    case (2048: its games), with the task's `case_columns`.

    Example: Score(Outcome.ok, {"works": 1.0, "no_cheating": 0.0, "strategy": 1.7}, cases=[{"seed": 4, "moves": 210,
    ...}], detail="")
    """

    outcome: Outcome
    rewards: Mapping[str, float]
    cases: Sequence[Mapping[str, Any]]
    detail: str
    checks: Mapping[str, bool | str | None] = dataclasses.field(default_factory=dict)
    # the columns of stages/tasks/checks.py

    @property
    def reward(self) -> float:
        return sum(self.rewards.values())


@dataclasses.dataclass(frozen=True)
class Options:
    """The `task.` keys of a task that brings none of its own."""

    cases: int = 8  # hidden seeds that a completion is judged on


class Task(abc.ABC):
    """A problem that a program can judge.

    `entry` is the function asked for; `reward_names` become the columns `reward_<name>`; `options_type` is a frozen
    dataclass with a default for each of the `task.` keys, one of which is named as `cases` and says how many there are.

    What else the tables of a run hold, and what everything that shows a run says, is told here:
        title           the task in words
        cases           what a program is judged on, in words and as the column that holds them
        player          what is judged on them, in words; it meets them, met them
        case_columns    Arrow's type of each column of a case
        recording       the case column that only a replay reads, if there is one
        good_states     the values of a case's `state` that mean success
        figures         the held-out figures; by the first one programs and exports are compared
        tally           a histogram over the cases of an evaluation, if there is one
        baseline_cases  on how many held-out cases a baseline is judged at the most
    """

    name: ClassVar[str]
    title: str
    entry: ClassVar[str]
    reward_names: ClassVar[tuple[str, ...]]
    cases: ClassVar[str] = "cases"
    player: ClassVar[str] = "program"
    meet: ClassVar[str] = "meet"
    met: ClassVar[str] = "met"
    case_columns: ClassVar[Mapping[str, str]]
    recording: ClassVar[str] = ""
    good_states: ClassVar[tuple[str, ...]] = ()
    figures: ClassVar[tuple[Figure, ...]] = (Figure("mean_grade", "mean grade", unit="mean over cases", digits=2),)
    tally: ClassVar[Tally | None] = None
    baseline_cases: ClassVar[int] = 64
    options_type: ClassVar[type[Any]] = Options
    options: Any

    def __init__(self, options: Any = None) -> None:
        self.options = options if options is not None else self.options_type()

    @abc.abstractmethod
    def prompt(self) -> str:
        """Returns the words put to the model."""

    def training_seeds(self, seed: int, iteration: int, group_index: int) -> list[int]:
        """Returns the hidden seeds that judge every completion of a group: even ones, held-out ones are odd."""
        count = getattr(self.options, self.cases)
        return [derive(self.name, "training", seed, iteration, group_index, case) & ~1 for case in range(count)]

    def held_out_seeds(self, count: int) -> list[int]:
        """Returns the first `count` seeds that no training ever uses, the same in every run: odd ones."""
        return [derive(self.name, "held out", case) | 1 for case in range(count)]

    def harness_source(self) -> str:
        """Returns the stdlib-only text that defines `judge` and `serve` inside the sandbox: harness.py beside the task.

        judge(cases, ask) runs in the supervisor: it returns or yields a row for each case, and ask(question) -> answer,
        both bytes, puts a question to the program. An answer may be any bytes: an exception of judge's own is taken for
        a failure of the sandbox and ends the run. serve(function, receive, send) runs in the program's process: it
        receives questions until one is empty, and sends an answer to each. probe(cases, ask), if there is one, runs
        after judge and returns columns of stages/tasks/checks.py.
        """
        return Path(inspect.getfile(type(self))).with_name("harness.py").read_text(encoding="utf-8")

    def job(self, job_id: str, program: str, seeds: Sequence[int], limits: Limits) -> Job:
        """Returns the job that judges the program on those seeds: a case is its seed and the task's options."""
        shared = {name: value for name, value in dataclasses.asdict(self.options).items() if name != self.cases}
        cases = tuple({"seed": seed, **shared} for seed in seeds)
        return Job(job_id=job_id, program=program, entry=self.entry, harness=self.name, cases=cases, limits=limits)

    def grade(self, case: Mapping[str, Any]) -> float:
        """Returns what one row of the judge is worth, if `score` and `measure` are as they are here."""
        raise NotImplementedError(f"{type(self).__name__} defines neither grade(case) nor score(result)")

    def score(self, result: Result | None) -> Score:
        """Returns the verdict on a result, or on a completion that held no program (None).

        Here: works is 1, 0 for a program that died or cheated, -1 for none or one that does not parse; no_cheating is
        0, -5 for a cheat; the third reward is the mean grade of the cases, 0 for a program that did not end well. Rows
        of a program that died are left out, so that stopping when ahead pays nothing.
        """
        works, no_cheating, worth = self.reward_names
        if result is None:
            rewards = {works: -1.0, no_cheating: 0.0, worth: 0.0}
            return Score(Outcome.no_program, rewards, [], "the final channel holds no program")
        cases = list(result.cases) if result.outcome is Outcome.ok else []
        rewards = {
            works: {Outcome.ok: 1.0, Outcome.syntax_error: -1.0}.get(result.outcome, 0.0),
            no_cheating: -5.0 if result.outcome in (Outcome.cheat, Outcome.foreign_import) else 0.0,
            worth: self.mean_grade(cases),
        }
        return Score(result.outcome, rewards, cases, result.detail)

    def measure(self, cases: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Returns the `figures` of a program that was judged on these cases; there may be none."""
        return {"mean_grade": self.mean_grade(cases)}

    def mean_grade(self, cases: Sequence[Mapping[str, Any]]) -> float:
        return sum(self.grade(case) for case in cases) / len(cases) if cases else 0.0

    def describe(self, cases: Sequence[Mapping[str, Any]]) -> str:
        """Returns what came of a program's cases, in one line."""
        figures = self.measure(cases)
        return ", ".join([f"{len(cases)} {self.cases}", *(f"{name} {value:.3g}" for name, value in figures.items())])

    def baselines(self) -> Mapping[str, str]:
        """Returns programs to compare with, by name."""
        return {}

    def validate(self) -> None:
        """Raises AssertionError unless known-good and known-bad answers score what they must.

        Here: every outcome has its rewards, and neither cheating nor failing pays.
        """
        empty = self.score(None)
        for outcome in Outcome:
            score = self.score(Result(job_id="validate", outcome=outcome, detail="", cases=()))
            assert set(score.rewards) == set(self.reward_names), f"{outcome}: rewards {sorted(score.rewards)}"
            assert math.isfinite(score.reward), f"{outcome} scores {score.reward}"
            if outcome in (Outcome.cheat, Outcome.foreign_import):
                assert score.reward < empty.reward, f"{outcome} scores {score.reward}, no program {empty.reward}"

    def prompts(self, count: int, iteration: int, seed: int) -> list[Prompt]:
        """Returns the prompts of an iteration, one a group; every group of these tasks is put the same words."""
        messages = ({"role": "user", "content": self.prompt()},)
        return [Prompt(f"{iteration:05d}-{index:03d}", messages) for index in range(count)]

    def extract(self, completion: str) -> str | None:
        """Returns the program in a completion's final channel, or None."""
        return programs.extract(completion, entry=self.entry)
