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
class Score:
    """The verdict on one completion; `reward` is the sum of its reward functions.

    Example: Score(Outcome.ok, {"works": 1.0, "no_cheating": 0.0, "strategy": 1.7}, games=[{"seed": 4, "moves": 210,
    ...}], detail="")
    """

    outcome: Outcome
    rewards: Mapping[str, float]
    games: Sequence[Mapping[str, Any]]
    detail: str
    checks: Mapping[str, bool | str | None] = dataclasses.field(default_factory=dict)
    # the columns of stages/tasks/checks.py

    @property
    def reward(self) -> float:
        return sum(self.rewards.values())


class Task(abc.ABC):
    """A problem that a program can judge.

    `entry` is the function asked for; `reward_names` become the columns `reward_<name>`.
    """

    name: ClassVar[str]
    entry: ClassVar[str]
    reward_names: ClassVar[tuple[str, ...]]
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
