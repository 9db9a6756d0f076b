"""What a benchmark has found so far, and how a command comes to it."""

import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from stages.bench import results
from stages.bench.memory import free_memory
from stages.bench.results import error_words

Row = dict[str, Any]


class Report:
    """Rows of several kinds; `save` is called with all of it after every finding, so a run that dies loses one."""

    def __init__(self, head: Row, save: Callable[[Row], None], *, kinds: Sequence[str]) -> None:
        self.body: Row = {**head, **{kind: [] for kind in kinds}}
        self._save = save
        self.failed = False

    def add(self, kind: str, row: Row) -> None:
        self.body[kind].append(row)
        self._save(self.body)

    def attempt(self, kind: str, about: Row, measure: Callable[[], Row]) -> None:
        """Adds what `measure` finds, or its error: one case out of memory must not cost the others."""
        try:
            self.add(kind, about | measure())
        except Exception as error:
            traceback.print_exc()
            self.failed = True
            self.add(kind, about | {"error": error_words(error)})
        finally:
            free_memory()

    def add_peer(self, name: str, rows: Iterable[Row], floor_of: Callable[[Row], float]) -> None:
        """Adds a peer's rows with their share of the tokens a second that `floor_of` a row says are the limit."""
        try:
            for row in rows:
                if "tokens_per_s" in row:
                    floor = floor_of(row)
                    row |= {"floor_tokens_per_s": floor, "floor_share": row["tokens_per_s"] / floor}
                self.add("rows", row)
        except Exception as error:  # its own set-up failed
            self.add("rows", {"system": name, "error": error_words(error)})


def recorded(
    path: Path,
    measure: Callable[[Callable[[Row], None], Callable[[str], None]], Report],
    lines_of: Callable[[Row], Iterable[str]],
) -> int:
    """Measures, saving the JSON as rows come and telling on stderr what is at work; prints the tables. 1 when something
    of ours could not be measured.
    """

    def save(body: Row) -> None:
        results.write(path, body)

    def note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    report = measure(save, note)
    save(report.body)
    for line in lines_of(report.body):
        print(line)
    print(f"written to  {path}")
    return 1 if report.failed else 0
