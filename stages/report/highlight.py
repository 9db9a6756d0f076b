"""Python source to HTML with classes for colour. Text in, text out: the program is escaped, never parsed or run.

A small lexer instead of `tokenize`, because half of what a model writes early on is not Python, and is shown too.
"""

import builtins
import html
import keyword
import re

TOKEN = re.compile(
    r"""(?P<comment>\#[^\n]*)
    |(?P<string>[rbfuRBFU]{0,2}(?:'''(?:\\.|[^\\])*?(?:'''|\Z)|\"\"\"(?:\\.|[^\\])*?(?:\"\"\"|\Z)|'(?:\\.|[^'\\\n])*'?|"(?:\\.|[^"\\\n])*"?))
    |(?P<number>\b(?:0[xob][\da-fA-F_]+|\d[\d_]*\.?[\d_]*(?:[eE][+-]?\d+)?)\b)
    |(?P<defined>(?<=\bdef\s)[^\W\d]\w*|(?<=\bclass\s)[^\W\d]\w*)
    |(?P<name>[^\W\d]\w*)
    """,
    re.VERBOSE | re.DOTALL,
)
BUILTINS = frozenset(name for name in dir(builtins) if not name.startswith("_"))


def python_to_html(source: str, *, max_lines: int = 400) -> str:
    """HTML of `source` with <b class="k|s|n|c|d|u"> around what has a colour; longer programs end in a note."""
    lines = source.split("\n")
    cut = len(lines) - max_lines
    if cut > 0:
        source = "\n".join(lines[:max_lines])
    parts, at = [], 0
    for match in TOKEN.finditer(source):
        parts.append(html.escape(source[at : match.start()]))
        kind, text = _kind(match), html.escape(match.group())
        parts.append(f'<b class="{kind}">{text}</b>' if kind else text)
        at = match.end()
    parts.append(html.escape(source[at:]))
    if cut > 0:
        parts.append(f'\n<b class="c"># ... {cut} more lines</b>')
    return "".join(parts)


def _kind(match: re.Match[str]) -> str:
    group = match.lastgroup or ""
    if group == "name":
        name = match.group()
        return "k" if keyword.iskeyword(name) else "u" if name in BUILTINS else ""
    return group[0]
