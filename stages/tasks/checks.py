"""What is said of a program beside its score, as columns of the scores table. Nothing here is ever part of a reward.

    depends_on_board   do equal random numbers and other boards give other answers?
    depends_on_calls   do equal boards give other answers at another call, for a counter, a cache or a random number?
    depends_on_random  and is it random numbers alone that make the difference?
    depends_on_time    false: a program that passes the static check has no clock (of what it may import nothing tells
                       the time), and the 2048 verdicts rest on no clock either
    state_kept         what the program may keep between calls, with lines, read off its text; "" where nothing is seen

The first three come of questions that a harness's `probe` asks when the cases are judged, completed by what the text
says: a program that never reads its argument does not depend on it; one that keeps state and was not seen to answer
otherwise may still do so, so depends_on_calls is unknown there. Null is unknown: the program did not come so far, its
task has no probe, or the probe could not tell.

Drawing lots is legitimate, and so is a cache. A program's games share one process and are played in lockstep, so state
could carry from one game into another what they have in common, which is nothing: their seeds are independent, and no
answer of the judge is ever seen by the program. So state is reported and not punished.
"""

import json
from typing import NamedTuple

from stages.sandbox.protocol import Outcome, Result

BEHAVIOUR = ("depends_on_board", "depends_on_calls", "depends_on_random")
COLUMNS = (*BEHAVIOUR, "depends_on_time", "state_kept")
CAUGHT = (Outcome.cheat, Outcome.foreign_import)


def columns_of(result: Result | None) -> dict[str, bool | str | None]:
    """Returns the value of every column in COLUMNS; all None for what never ran."""
    columns: dict[str, bool | str | None] = dict.fromkeys(COLUMNS)
    notes = read_notes(result.notes) if result is not None else None
    if result is None or notes is None:
        return columns
    for name in BEHAVIOUR:
        value = result.checks.get(name)
        columns[name] = value if isinstance(value, bool) else None
    columns["state_kept"] = notes.state
    if notes.reads_argument is False:
        columns["depends_on_board"] = False
    if notes.state and columns["depends_on_calls"] is False:
        columns["depends_on_calls"] = None
    if result.outcome not in CAUGHT:
        columns["depends_on_time"] = False
    return columns


class Notes(NamedTuple):
    """What the static check notes of a program: containers/sandbox/state.py."""

    reads_argument: bool | None
    state: str


def read_notes(text: str) -> Notes | None:
    """Returns the notes that a case sent of its program before it ran; None where it sent none that can be read."""
    try:
        notes = json.loads(text)
    except ValueError:
        return None
    if not isinstance(notes, dict) or not isinstance(notes.get("state"), str):
        return None
    return Notes(notes.get("reads_argument"), notes["state"])
