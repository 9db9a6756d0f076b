"""The tasks by name, with their options checked."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from stages.config import RunConfig, UserError, unknown
from stages.tasks.base import Task
from stages.tasks.game2048.task import Game2048
from stages.tasks.game2048.task import Options as Game2048Options
from stages.tasks.matmul.task import Matmul
from stages.tasks.matmul.task import Options as MatmulOptions

TASKS: Mapping[str, tuple[Any, Any]] = {
    "game2048": (Game2048, Game2048Options),
    "matmul": (Matmul, MatmulOptions),
}


def get(name: str, options: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> Task:
    """Returns the task of that name with those options; UserError names what is unknown or of the wrong type.

    Example: get("game2048", {"size": 5, "games": 8})
    """
    if name not in TASKS:
        raise unknown(f"task {name!r}", name, TASKS, prefix="task.name=")
    task, options_type = TASKS[name]
    fields = {field.name: field for field in dataclasses.fields(options_type)}
    values = dict(options)
    for key, value in values.items():
        if key not in fields:
            raise unknown(f"key task.{key} of {name}", key, fields, prefix="task.")
        expected = type(fields[key].default)
        if type(value) is not expected:
            raise UserError(f"task.{key} is {value!r}", f"it takes a value of type {expected.__name__}")
    chosen: Task = task(options_type(**values))
    return chosen


def of(config: RunConfig) -> Task:
    """Returns the task of a run's configuration."""
    return get(config.task.name, config.task.option_values())


def check(name: str, options: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
    """Raises UserError, before anything is sampled, where the task cannot be trained on with those options."""
    get(name, options).held_out_seeds(1)
