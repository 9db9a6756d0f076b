"""Figures as people read them. Minus signs are minus signs, thousands are set apart, units follow a thin space."""

import math

THIN, MINUS, DASH = "\u202f", "\u2212", "\u2013"


def number(value: float | None) -> str:
    """Three digits that matter: 0, 0.0345, 1.23, 12.3, 1 234; a dash for None or NaN."""
    if value is None or math.isnan(value):
        return DASH
    size = abs(value)
    if size >= 100 or value == int(value):
        text = f"{value:,.0f}".replace(",", THIN)
    elif size >= 0.0005:
        text = f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"
        text = text.rstrip("0").rstrip(".") if size < 1 else text
    else:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", MINUS)


def fixed(value: float) -> str:
    """Two decimals, so that rewards line up."""
    return f"{value:.2f}".replace("-", MINUS)


def percent(part: float, whole: float = 1.0) -> str:
    """part of whole: 0 %, 1.2 %, 45 %."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.0f}{THIN}%" if share == round(share) or share >= 10 else f"{share:.1f}{THIN}%"


def percents(low: float, high: float) -> str:
    """Two shares as a range: 0-3.2 %."""
    return f"{percent(low).removesuffix(THIN + '%')}{DASH}{percent(high)}"


def duration(seconds: float) -> str:
    """0.8 s, 42 s, 6 min 10 s, 3 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(count: int) -> str:
    """Bytes in MiB or GiB; nothing for 0, which is what nobody measured."""
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.{0 if count >= 10 * 2**20 else 1}f} MiB" if count else ""


def words(name: str) -> str:
    """A name from a table as words: syntax error for syntax_error."""
    return name.replace("_", " ")


def capital(text: str) -> str:
    """The text with its first letter as a capital."""
    return text[:1].upper() + text[1:]
