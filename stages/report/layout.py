"""What every section of the page is made of: a heading with a note, and a chart drawn in the widths it is shown in."""

from collections.abc import Callable

WIDTHS = (("wide", 1060), ("middle", 640), ("narrow", 330))
HALVES = (("tall", 510), ("short", 330))


def section(title: str, note: str, body: str) -> str:
    """A part of the page; all three are markup."""
    return f"<section><h2>{title}</h2><p>{note}</p>{body}</section>"


def card(body: str, *, title: str = "", note: str = "", more: str = "") -> str:
    """A framed part of a section; `more` are further CSS classes."""
    head = (f"<h3>{title}</h3>" if title else "") + (f"<p>{note}</p>" if note else "")
    return f'<div class="card {more}">{head}{body}</div>' if more else f'<div class="card">{head}{body}</div>'


def in_widths(draw: Callable[[int], str]) -> str:
    """A chart as wide as the page, drawn once for each kind of screen; the style shows the one that fits."""
    return "".join(f'<div class="{name}">{draw(width)}</div>' for name, width in WIDTHS)


def in_halves(draw: Callable[[int], str]) -> str:
    """A chart of half the page, which is as wide as a phone."""
    return "".join(f'<div class="{name}">{draw(width)}</div>' for name, width in HALVES)


def table(heads: list[str], rows: list[str]) -> str:
    """A table that scrolls sideways where it does not fit; the rows are markup."""
    cells = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
