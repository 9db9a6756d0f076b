"""The matmul task: the model writes `matmul(A, B)` on lists of lists.

It has a prompt and finds the program in a completion. Its judge needs timings taken by the sandbox's supervisor, which
is not written yet, so every method that would lead to a reward refuses.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NoReturn

from stages.config import UserError
from stages.sandbox.protocol import Job, Limits, Result
from stages.tasks.base import Score, Task

PROMPT = """\
Write a Python function matmul(A: list[list[float]], B: list[list[float]]) -> list[list[float]] \
that returns the matrix product of A and B, as fast as pure Python can. \
The matrices have any sizes that fit. Do not change A or B. \
Import only math, random, itertools, collections, functools, heapq, copy or typing. \
Answer with one fenced python code block that holds the function."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The `task.` keys of matmul: none so far."""


class Matmul(Task):
    name = "matmul"
    entry = "matmul"
    reward_names = ("works", "no_cheating", "correctness", "speed")

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()

    def prompt(self) -> str:
        return PROMPT

    def refuse(self) -> NoReturn:
        raise UserError("task.name is matmul, which has no judge yet", "train on task.name=game2048")

    def training_seeds(self, seed: int, iteration: int, group_index: int) -> list[int]:
        self.refuse()

    def held_out_seeds(self, count: int) -> list[int]:
        self.refuse()

    def harness_source(self) -> str:
        self.refuse()

    def job(self, job_id: str, program: str, seeds: Sequence[int], limits: Limits) -> Job:
        self.refuse()

    def score(self, result: Result | None) -> Score:
        self.refuse()

    def baselines(self) -> Mapping[str, str]:
        self.refuse()

    def validate(self) -> None:
        self.refuse()
