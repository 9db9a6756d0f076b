"""The tasks by name, with their options checked: the project's own, then those of plugins.py."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from stages.config import RunConfig, UserError, unknown
from stages.tasks import plugins
from stages.tasks.base import Task
from stages.tasks.game2048.task import Game2048
from stages.tasks.matmul.task import Matmul

TASKS: Mapping[str, type[Task]] = {task.name: task for task in (Game2048, Matmul)}


def get(name: str, options: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> Task:
    """Returns the task of that name with those options; UserError names what is unknown or of the wrong type.

    Example: get("game2048", {"size": 5, "games": 8})
    """
    task = TASKS.get(name) or plugins.load(name)
    if task is None:
        raise unknown(f"task {name!r}", name, [*TASKS, *plugins.names()], prefix="task.name=")
    fields = {field.name: field for field in dataclasses.fields(task.options_type)}
    values = dict(options)
    for key, value in values.items():
        if key not in fields:
            raise unknown(f"key task.{key} of {name}", key, fields, prefix="task.")
        expected = type(fields[key].default)
        if type(value) is not expected:
            raise UserError(f"task.{key} is {value!r}", f"it takes a value of type {expected.__name__}")
    return task(task.options_type(**values))


def of(config: RunConfig) -> Task:
    """Returns the task of a run's configuration."""
    return get(config.task.name, config.task.option_values())


def check(name: str, options: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
    """Raises UserError, before anything is sampled, where the task cannot be trained on with those options."""
    get(name, options).held_out_seeds(1)
