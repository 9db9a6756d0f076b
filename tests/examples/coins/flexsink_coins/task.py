"""Coins: the model writes `strategy(board)`, which walks on a board of coins; the more it collects the more it earns.

    pip install -e tests/examples/coins
    flexsink train tiny task.name=coins task.size=5

The reward is works + no_cheating + coins, as stages/tasks/base.py has it; coins is 10 times the share collected of what
a walker could pick up at best, one of the richest cells a step.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from stages.config import UserError
from stages.tasks.base import Task

PROMPT = """\
Write a Python function strategy(board: list[list[int]]) -> str that collects coins on a {size}x{size} board \
in {steps} steps. board holds rows of numbers, the coins of each cell, 0 is empty. \
You stand on board[0][0], and the board wraps around. \
Return the next move: 'W' up, 'A' left, 'S' down or 'D' right. \
Import only math, random, itertools, collections, functools, heapq, copy or typing. \
Answer with one fenced python code block that holds the function."""

NEAREST = """\
def strategy(board):
    around = {"W": board[-1][0], "A": board[0][-1], "S": board[1][0], "D": board[0][1]}
    return max(around, key=around.get)
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """The `task.` keys of coins."""

    size: int = 4  # cells a side, 3 to 15
    steps: int = 8  # moves of a walk
    cases: int = 8  # hidden boards that a completion is judged on

    def __post_init__(self) -> None:
        if not 3 <= self.size <= 15:
            raise UserError(f"task.size is {self.size}", "a board of coins has 3 to 15 cells a side")
        if not 1 <= self.steps < self.size**2:
            raise UserError(f"task.steps is {self.steps}", f"give 1 to {self.size**2 - 1} for a size of {self.size}")


class Coins(Task):
    name = "coins"
    title = "collecting coins"
    entry = "strategy"
    reward_names = ("works", "no_cheating", "coins")
    case_columns: ClassVar = {"seed": "int64", "coins": "int32", "most": "int32", "moves": "string"}
    options_type = Options

    def prompt(self) -> str:
        return PROMPT.format(size=self.options.size, steps=self.options.steps)

    def grade(self, case: Mapping[str, Any]) -> float:
        return 10 * case["coins"] / case["most"]

    def baselines(self) -> Mapping[str, str]:
        return {"right": "def strategy(board):\n    return 'D'\n", "nearest": NEAREST}
