"""The schemas of the tables whose columns depend on the task: scores, evaluations and their summary."""

import pyarrow as pa

from stages.artifacts.parquet import evaluations_schema, scores_schema, summary_schema
from stages.tasks.base import Task


def scores(task: Task) -> pa.Schema:
    """Returns the schema of a score stage's rows."""
    return scores_schema(task.reward_names, cases=task.cases, case_columns=task.case_columns)


def evaluations(task: Task) -> pa.Schema:
    """Returns the schema of an evaluation's rows, one for each program."""
    return evaluations_schema(figures(task), cases=task.cases, case_columns=task.case_columns)


def summary(task: Task) -> pa.Schema:
    """Returns the schema of an evaluation's summary, a row for the policy and each baseline."""
    tally = (task.tally.name, task.tally.value) if task.tally else None
    return summary_schema(figures(task), cases=task.cases, tally=tally)


def figures(task: Task) -> list[tuple[str, str]]:
    return [(figure.name, figure.unit) for figure in task.figures]
