"""What a task is to the stages: prompts and seeds going in, a job for the sandbox, a score coming out."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

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


class Task(abc.ABC):
    """A problem that a program can judge.

    `entry` is the function asked for; `reward_names` become the columns `reward_<name>`.

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
    figures: ClassVar[tuple[Figure, ...]]
    tally: ClassVar[Tally | None] = None
    baseline_cases: ClassVar[int] = 64
    options: Any

    @abc.abstractmethod
    def prompt(self) -> str:
        """Returns the words put to the model."""

    @abc.abstractmethod
    def training_seeds(self, seed: int, iteration: int, group_index: int) -> list[int]:
        """Returns the hidden seeds that judge every completion of a group; never one of the held-out seeds."""

    @abc.abstractmethod
    def held_out_seeds(self, count: int) -> list[int]:
        """Returns the first `count` seeds that no training ever uses, the same in every run."""

    @abc.abstractmethod
    def harness_source(self) -> str:
        """Returns the stdlib-only text that defines `judge` and `serve` inside the sandbox."""

    @abc.abstractmethod
    def job(self, job_id: str, program: str, seeds: Sequence[int], limits: Limits) -> Job:
        """Returns the job that judges the program on those seeds."""

    @abc.abstractmethod
    def score(self, result: Result | None) -> Score:
        """Returns the verdict on a result, or on a completion that held no program (None)."""

    @abc.abstractmethod
    def measure(self, cases: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Returns the `figures` of a program that was judged on these cases; there may be none."""

    @abc.abstractmethod
    def describe(self, cases: Sequence[Mapping[str, Any]]) -> str:
        """Returns what came of a program's cases, in one line."""

    @abc.abstractmethod
    def baselines(self) -> Mapping[str, str]:
        """Returns programs to compare with, by name."""

    @abc.abstractmethod
    def validate(self) -> None:
        """Raises AssertionError unless known-good and known-bad answers score what they must."""

    def prompts(self, count: int, iteration: int, seed: int) -> list[Prompt]:
        """Returns the prompts of an iteration, one a group; every group of these tasks is put the same words."""
        messages = ({"role": "user", "content": self.prompt()},)
        return [Prompt(f"{iteration:05d}-{index:03d}", messages) for index in range(count)]

    def extract(self, completion: str) -> str | None:
        """Returns the program in a completion's final channel, or None."""
        return programs.extract(completion, entry=self.entry)
