"""Tasks that other distributions bring, by the entry point group `flexsink.tasks`.

    [project.entry-points."flexsink.tasks"]
    coins = "flexsink_coins.task:Coins"

A plugin's task runs with the rights of whoever trains: installing it is trusting it. Its harness is trusted by the
sandbox's supervisor as well; only the programs that a model writes are not. What is wrong with a plugin is a UserError
that names the distribution.
"""

import dataclasses
import inspect
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from stages.artifacts.manifest import TASKS as GROUP
from stages.config import UserError
from stages.tasks.base import Task

NEEDED = ("name", "title", "entry", "reward_names", "case_columns")
CASE_TYPES = ("bool", "int32", "int64", "float64", "string")
OPTION_TYPES = (bool, int, float, str)


def find(name: str) -> Sequence[EntryPoint]:
    """Returns the entry points of that name, one for each distribution that has it."""
    return entry_points(group=GROUP, name=name)


def names() -> list[str]:
    """Returns the names of the tasks that installed distributions bring."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def load(name: str) -> type[Task] | None:
    """Returns the task of that name that a distribution brings, None if none does; UserError for a broken one."""
    points = find(name)
    if not points:
        return None
    if len({point.value for point in points}) > 1:
        brought = " and ".join(sorted(told(point) for point in points))
        raise UserError(f"task {name!r} is brought by {brought}", "uninstall all but one of them")
    point = next(iter(points))
    try:
        found = point.load()
    except Exception as error:  # importing what somebody else wrote may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"task {name!r} of {told(point)} does not load: {type(error).__name__}: {reason}",
            f'look at {point.value}, try: python -c "import {point.module}"',
        ) from error
    problem = problem_of(found, name)
    if problem:
        hint = f"look at {point.value}; stages/tasks/base.py says what a task is, README.md has an example"
        raise UserError(f"task {name!r} of {told(point)} is no task: {problem}", hint)
    task: type[Task] = found
    return task


def told(point: EntryPoint) -> str:
    """Returns the distribution in words: flexsink-coins 0.1."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"


def problem_of(found: Any, name: str) -> str:
    """Returns what keeps an object from being the task of that name; "" where nothing does."""
    if not (isinstance(found, type) and issubclass(found, Task)):
        return f"{found!r} is not a subclass of stages.tasks.base.Task"
    if inspect.isabstract(found):
        return f"it does not define {', '.join(sorted(found.__abstractmethods__))}"
    missing = [each for each in NEEDED if not hasattr(found, each)]
    if missing:
        return f"it does not set {', '.join(missing)}"
    if found.name != name:
        return f"its name is {found.name!r}, its entry point's {name!r}"
    rewards = found.reward_names
    if isinstance(rewards, str) or not rewards or not all(isinstance(each, str) for each in rewards):
        return f"its reward_names are {rewards!r}, not a tuple of words"
    if found.score is Task.score and (len(rewards) != 3 or found.grade is Task.grade):
        return "without a score(result) of its own it needs grade(case) and three reward_names"
    wrong = {column: kind for column, kind in found.case_columns.items() if kind not in CASE_TYPES}
    if wrong:
        return f"its case_columns have {wrong}; types are {', '.join(CASE_TYPES)}"
    return problem_of_options(found.options_type, found.cases)


def problem_of_options(options: Any, cases: str) -> str:
    """Returns what keeps a class from being a task's options; "" where nothing does."""
    if not (isinstance(options, type) and dataclasses.is_dataclass(options)):
        return f"its options_type is {options!r}, not a dataclass"
    for field in dataclasses.fields(options):
        if type(field.default) not in OPTION_TYPES:
            return f"its option {field.name} has no default that is a bool, a number or a word"
    if cases not in {field.name for field in dataclasses.fields(options)}:
        return f"its options have no {cases}, which says on how many hidden seeds a completion is judged"
    return ""
