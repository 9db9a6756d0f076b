"""What the programs of training achieved, iteration by iteration, in the task's own figures: points, speed-ups.

Reads the cases of every completion column by column, without what only a replay reads, so that a run of 100 000
completions with 400 000 games is summed up in seconds.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.artifacts.parquet import damaged, part_paths
from stages.artifacts.run import RunDir
from stages.artifacts.stage import StageId
from stages.report.contents import Achieved
from stages.tasks.base import Task
from stages.tasks.matmul.task import Matmul, is_right

# Ends of the bins of a speed-up, and what they are called; a program that is not right has none.
SPEEDS = ((0.5, "<\u00bd"), (1.0, "\u00bd\u20131"), (2.0, "1\u20132"), (4.0, "2\u20134"), (8.0, "4\u20138"))
WRONG, FASTER = "wrong", "8+"
BINS = (WRONG, *(name for _, name in SPEEDS), FASTER)


def achieved(run: RunDir, iterations: Iterable[int], task: Task) -> list[Achieved]:
    """For each figure of the task its mean over an iteration's completions, and the quartiles of what is no share."""
    rows = [[task.measure(cases) for cases in cases_of(run, index, task)] for index in iterations]
    found = []
    for figure in task.figures:
        columns = [sorted(row[figure.name] for row in each) for each in rows]
        found.append(
            Achieved(
                title=figure.title,
                unit=figure.unit,
                share=figure.share,
                mean=[sum(values) / len(values) if values else None for values in columns],
                low=[] if figure.share else [quantile(values, 0.25) for values in columns],
                high=[] if figure.share else [quantile(values, 0.75) for values in columns],
            )
        )
    return found


def cases_of(run: RunDir, iteration: int, task: Task) -> list[list[dict[str, Any]]]:
    """The cases of each completion of an iteration, in the order of its scores, without the task's recording."""
    found: list[list[dict[str, Any]]] = []
    names = [name for name in task.case_columns if name != task.recording]
    for path in part_paths(run.folder(StageId("score", iteration)), "scores"):
        found += _cases(path, task.cases, names)
    return found


def _cases(path: Any, column: str, names: Sequence[str]) -> list[list[dict[str, Any]]]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if column not in file.schema_arrow.names:
                return []
            table = file.read(columns=[f"{column}.list.element.{name}" for name in names])
    except (OSError, ValueError) as error:  # Arrow's own errors are ValueErrors
        raise damaged(path, error) from error
    lists = table[column].combine_chunks()
    counts = [count or 0 for count in pc.list_value_length(lists).to_pylist()]
    flat = pc.list_flatten(lists)
    present = [name for name in names if flat.type.get_field_index(name) >= 0]
    values = zip(*(pc.struct_field(flat, name).to_pylist() for name in present), strict=True)
    rows = (dict(zip(present, each, strict=True)) for each in values)
    return [[next(rows) for _ in range(count)] for count in counts]


def speeds(rows: Iterable[Mapping[str, Any]], task: Matmul) -> dict[int | str, int]:
    """How many programs of an evaluation have a speed-up in each of BINS."""
    counts: Counter[int | str] = Counter()
    for row in rows:
        cases = row[task.cases] or []
        speedup = task.measure(cases)["mean_speedup"]
        counts[next((name for end, name in SPEEDS if speedup < end), FASTER) if is_right(cases) else WRONG] += 1
    return dict(counts)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The quantile of sorted values, between its neighbours; None of no values."""
    if not values:
        return None
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])
