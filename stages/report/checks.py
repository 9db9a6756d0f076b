"""The section about what the answers depend on: the checks that no reward is made of. Contents in, HTML out."""

from html import escape

from stages.artifacts.history import Iteration
from stages.report.charts import Curve, line_chart
from stages.report.contents import Contents, Program
from stages.report.figures import percent
from stages.report.layout import card, section, table

# A check, the answer that is counted, what it is called, and what it says where it is so.
SHOWN = (
    ("depends_on_board", "no", "Ignores its input", "Answers that do not depend on what the program is given."),
    ("depends_on_calls", "yes", "Other answer next time", "The same input is answered otherwise at another call."),
    ("depends_on_random", "yes", "Draws lots", "Random numbers alone make the difference."),
    ("depends_on_time", "yes", "May know the time", "A way to tell the time was seen."),
    ("state_kept", "yes", "May keep state", "Something may be kept from one call to the next."),
)


def dependence(contents: Contents) -> str:
    """How many programs that ended ok ignore their input, draw random numbers, keep state, of those that are known."""
    rows = contents.iterations
    shown = [each for each in SHOWN if any(_known(row, each[0]) for row in rows)]
    if not shown:
        return ""
    cards = "".join(_chart(rows, *each) for each in shown)
    return section(
        "What the answers depend on",
        "Shares of the programs that ended ok and of which it is known. No reward is made of this: drawing lots is "
        "legitimate, and so is a cache; a program that ignores its input has found another way to its reward.",
        f'<div class="grid">{cards}</div>{_table(rows, shown)}',
    )


def chips(program: Program) -> str:
    """The checks of one program that are answered, as chips."""
    told = [
        f'<span class="chip{" odd" if _odd(name, value) else ""}">'
        f"{escape(name.removeprefix('depends_on_'))}: {'yes' if value else 'no'}</span>"
        for name, value in program.checks.items()
        if isinstance(value, bool)
    ]
    return f'<p class="results">depends on {" ".join(told)}</p>' if told else ""


def share(row: Iteration, name: str, answer: str) -> float | None:
    """The share of the programs of which it is known that have this answer; None where nothing is known."""
    known = _known(row, name)
    return row.checks[name][answer] / known if known else None


def _known(row: Iteration, name: str) -> int:
    counts = row.checks.get(name, {})
    return counts.get("yes", 0) + counts.get("no", 0)


def _odd(name: str, value: bool) -> bool:
    return (name == "depends_on_board" and not value) or (name == "depends_on_time" and value)


def _chart(rows: list[Iteration], name: str, answer: str, title: str, note: str) -> str:
    curve = Curve(title, [share(row, name, answer) for row in rows])
    known = [value for value in curve.ys if value is not None]
    label = f"{title}: share per iteration, from {percent(known[0])} to {percent(known[-1])}"
    chart = line_chart(curve, width=330, height=150, label=label, from_zero=True, percents=True)
    return card(chart, title=title, note=note)


def _table(rows: list[Iteration], shown: list[tuple[str, str, str, str]]) -> str:
    body = [
        f'<tr><th scope="row">{escape(title)}</th>'
        + "".join(_cells(row.checks.get(name, {}), answer) for row in (rows[0], rows[-1]))
        + "</tr>"
        for name, answer, title, _ in shown
    ]
    first, last = rows[0].index, rows[-1].index
    heads = ["Programs", f"Iteration {first}", "unknown", f"Iteration {last}", "unknown"]
    return (
        '<details class="more"><summary>The counts of the first and the last iteration</summary>'
        f"{card(table(heads, body))}</details>"
    )


def _cells(counts: dict[str, int], answer: str) -> str:
    known = counts.get("yes", 0) + counts.get("no", 0)
    return f"<td>{counts.get(answer, 0)} <small>of {known}</small></td><td>{counts.get('unknown', 0)}</td>"
