"""A program with line numbers and colours of the theme; it is coloured as text, never parsed or run."""

from pygments.token import Token
from textual.content import Content
from textual.highlight import HighlightTheme, highlight

from stages.runs.tables import printable


class Colours(HighlightTheme):
    """The report's colours for Python, light and dark."""

    STYLES = {  # noqa: RUF012 - as its base class declares it
        Token.Comment: "$text-muted italic",
        Token.Keyword: "$accent",
        Token.Operator.Word: "$accent",
        Token.Literal.Number: "$warning",
        Token.Literal.String: "$success",
        Token.Name.Builtin: "$secondary",
        Token.Name.Function: "$primary bold",
        Token.Name.Class: "$primary bold",
    }


def numbered(source: str, *, marked: set[int] = frozenset()) -> Content:  # type: ignore[assignment]
    """The program, each line with its number, those that the verdict speaks of marked."""
    lines = highlight(printable(source).expandtabs(4), language="python", theme=Colours).split("\n", allow_blank=True)
    width = len(str(len(lines)))
    found = []
    for number, line in enumerate(lines, start=1):
        sign, style = ("\u25b8", "$error") if number in marked else (" ", "$text-muted")
        found.append(Content.assemble((f"{sign}{number:>{width}}  ", style), line))
    return Content("\n").join(found)
