"""The matmul task: the model writes `matmul(A, B)` on lists of lists; right answers earn, fast right ones earn more.

Each reward is a column of its own; the reward is their sum.
    works        1 if every call was answered, right or wrong; 0 if the program died (crash, timeout, memory, output)
                 or cheated, -1 if there was none or it does not parse
    no_cheating  -5 for an import that is not allowed or a forbidden act, else 0
    correctness  3 if every product of every case was right, else 0
    speed        mean over the cases of 2 log2(speed-up), each from -2 to 6; 0 unless everything was right
The speed-up is that over three plain loops. Correctness is all or nothing, because a share would pay a program that is
right on the first calls only. So a wrong program earns at most what handing back an input earns, 1; a right one at
least 2, three loops 4, twice their speed 6, eight times their speed and more 10.

Not covered: how the model came to its program; what one processor does faster than another.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from stages.config import UserError
from stages.sandbox.protocol import Outcome, Result
from stages.tasks.base import Figure, Score, Task
from stages.tasks.matmul.baselines import BASELINES

PROMPT = """\
Write a Python function matmul(A: list[list[float]], B: list[list[float]]) -> list[list[float]] \
that returns the matrix product of A and B, as fast as pure Python can. \
The matrices have any sizes that fit. Do not change A or B. \
Import only math, random, itertools, collections, functools, heapq, copy or typing. \
Answer with one fenced python code block that holds the function."""

RIGHT = 3.0
SLOWEST, FASTEST = -2.0, 6.0  # half of three loops' speed, eight times it


@dataclasses.dataclass(frozen=True)
class Options:
    """The `task.` keys of matmul."""

    cases: int = 2  # hidden seeds a completion is judged on; each checks nine odd shapes and times one product
    smallest: int = 24  # rows, columns and inner size of a timed product are drawn from smallest to largest
    largest: int = 40
    trials: int = 6  # calls that are timed, of which the median counts

    def __post_init__(self) -> None:
        if not 1 <= self.cases <= 100:
            raise UserError(f"task.cases is {self.cases}", "a completion is judged on 1 to 100 cases")
        if not 8 <= self.smallest <= self.largest <= 128:
            raise UserError(
                f"task.smallest is {self.smallest}, task.largest {self.largest}", "a timed product has sizes 8 to 128"
            )
        if not 1 <= self.trials <= 99:
            raise UserError(f"task.trials is {self.trials}", "a product is timed 1 to 99 times")


class Matmul(Task):
    name = "matmul"
    title = "fast matrix multiplication in pure Python"
    entry = "matmul"
    reward_names = ("works", "no_cheating", "correctness", "speed")
    case_columns: ClassVar = {
        "seed": "int64",
        "rows": "int32",
        "inner": "int32",
        "columns": "int32",
        "products": "int32",
        "error": "float64",
        "speedup": "float64",
        "program_ms": "float64",
        "baseline_ms": "float64",
        "state": "string",
    }
    good_states = ("right",)
    figures = (
        Figure("mean_speedup", "speed-up", unit="times three loops, 0 for a program that is not right", digits=2),
        Figure("right", "right", unit="share of programs right on every product", share=True),
    )
    baseline_cases = 16

    options_type = Options

    def prompt(self) -> str:
        return PROMPT

    def score(self, result: Result | None) -> Score:
        if result is None:
            rewards = {"works": -1.0, "no_cheating": 0.0, "correctness": 0.0, "speed": 0.0}
            return Score(Outcome.no_program, rewards, [], "the final channel holds no program")
        cheated = result.outcome in (Outcome.cheat, Outcome.foreign_import)
        right = result.outcome is Outcome.ok and is_right(result.cases)
        works = {Outcome.ok: 1.0, Outcome.no_program: -1.0, Outcome.syntax_error: -1.0}
        rewards = {
            "works": works.get(result.outcome, 0.0),
            "no_cheating": -5.0 if cheated else 0.0,
            "correctness": RIGHT if right else 0.0,
            "speed": statistics.fmean(grade(case["speedup"]) for case in result.cases) if right else 0.0,
        }
        cases = [{name: value for name, value in case.items() if name != "detail"} for case in result.cases]
        return Score(result.outcome, rewards, cases, result.detail or fault(result.cases))

    def measure(self, cases: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Returns the mean speed-up and 1.0 when every product was right, zeros when one was not."""
        if not is_right(cases):
            return {"mean_speedup": 0.0, "right": 0.0}
        return {"mean_speedup": statistics.fmean(case["speedup"] for case in cases), "right": 1.0}

    def describe(self, cases: Sequence[Mapping[str, Any]]) -> str:
        if not is_right(cases):
            return fault(cases)
        slow, fast = (f"{choose(case['speedup'] for case in cases):.2f}" for choose in (min, max))
        products = sum(case["products"] for case in cases)
        return f"{products} products right, {slow} to {fast} times as fast as three loops"

    def baselines(self) -> Mapping[str, str]:
        return BASELINES

    def validate(self) -> None:
        def verdict(outcome: Outcome, state: str, speedup: float | None = None) -> float:
            case = {"seed": 2, "rows": 3, "inner": 4, "columns": 5, "products": 15, "error": 0.0, "speedup": speedup}
            cases = ({**case, "program_ms": 1.0, "baseline_ms": 1.0, "state": state, "detail": ""},)
            return self.score(Result(job_id="validate", outcome=outcome, detail="", cases=cases)).reward

        loops, fast, fastest = (verdict(Outcome.ok, "right", times) for times in (1.0, 4.0, 1e9))
        assert (loops, fast, fastest) == (4.0, 8.0, 10.0), f"speed-ups of 1, 4 and 1e9 score {loops}, {fast}, {fastest}"
        slowest = verdict(Outcome.ok, "right", 1e-9)
        identity = verdict(Outcome.ok, "wrong", None)
        assert identity < slowest < loops, f"wrong {identity}, right and slow {slowest}, three loops {loops}"
        assert verdict(Outcome.ok, "wrong", 9.0) == identity, "a speed counts although an answer was wrong"
        assert self.score(Result(job_id="", outcome=Outcome.ok, detail="", cases=())).reward == identity
        for outcome in Outcome:
            if outcome is not Outcome.ok:
                assert verdict(outcome, "right", 8.0) < identity, f"{outcome} scores more than handing back an input"
        assert verdict(Outcome.cheat, "right", 8.0) < self.score(None).reward < identity, "cheating pays"


def is_right(cases: Sequence[Mapping[str, Any]]) -> bool:
    """Says whether there are cases and every product in them was right."""
    return bool(cases) and all(case["state"] == "right" for case in cases)


def grade(speedup: float) -> float:
    """Returns twice the log2 of a speed-up, from SLOWEST to FASTEST."""
    return min(FASTEST, max(SLOWEST, 2 * math.log2(max(speedup, 1e-9))))


def fault(cases: Sequence[Mapping[str, Any]]) -> str:
    """Returns what was wrong with the first case that was not right, and on which shapes."""
    for case in cases:
        if case["state"] != "right" and case["rows"] is not None:
            error = f", off by {case['error']:.3g}" if case["state"] == "wrong" and case["error"] is not None else ""
            why = case.get("detail") or case["state"].replace("_", " ")
            return f"{case['rows']}x{case['inner']} times {case['inner']}x{case['columns']}: {why}{error}"
    return ""
