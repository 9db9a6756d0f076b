"""Charts as SVG text: lines with a band, stacked bars, intervals, histograms. Numbers in, markup out.

Each chart carries a sentence for screen readers and, where there is something to point at, `data-tips`: one line of
text per x position, which the page's script shows beside a crosshair. Colours are CSS classes, so one drawing serves
light and dark. Sizes are in CSS pixels at scale 1; the page draws wide charts in several widths and shows the one that
fits, because text in a scaled drawing does not stay readable on a phone.
"""

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stages.report.figures import number, percent

Values = Sequence[float | None]


@dataclass(frozen=True)
class Curve:
    """One value per iteration, None where there is none, and optionally the band around it.

    Example: Curve(name="mean", ys=[0.1, 0.4], low=[-0.5, -0.1], high=[0.8, 1.0])
    """

    name: str
    ys: Values
    low: Values = ()
    high: Values = ()
    axis: str = "Iteration"


@dataclass(frozen=True)
class Interval:
    """One row of an interval chart: a mean and its 95 % interval; `tone` is the CSS class."""

    label: str
    mean: float
    low: float
    high: float
    tone: str


@dataclass(frozen=True)
class Frame:
    """Where the plot area lies in the drawing, in px."""

    width: int
    height: int
    left: int = 46
    right: int = 12
    top: int = 10
    bottom: int = 26

    def x(self, share: float) -> float:
        return round(self.left + share * (self.width - self.left - self.right), 2)

    def y(self, share: float) -> float:
        return round(self.height - self.bottom - share * (self.height - self.top - self.bottom), 2)


def line_chart(
    curve: Curve,
    *,
    width: int,
    height: int,
    label: str,
    from_zero: bool = False,
    joined: bool = False,
    percents: bool = False,
) -> str:
    """A line over iterations, with its band. Gaps stay gaps unless `joined`, which also marks each value by a dot.

    percents: the values are shares, told in per cent, and the scale goes no further than 0 to 1
    """
    frame = Frame(width, height)
    known = [v for v in (*curve.ys, *curve.low, *curve.high) if v is not None]
    ticks = nice_ticks(
        min([*known, 0.0] if from_zero else known, default=0.0), max(known, default=1.0), count=max(2, height // 60)
    )
    if percents:
        ticks = [tick for tick in ticks if tick <= 1.0]
    bottom, span = ticks[0], (ticks[-1] - ticks[0]) or 1.0
    last = max(len(curve.ys) - 1, 1)

    def point(index: int, value: float) -> tuple[float, float]:
        return frame.x(index / last), frame.y((value - bottom) / span)

    parts = [_grid(frame, ticks, bottom, span, shares=percents), _iterations(frame, len(curve.ys))]
    if curve.low:
        for run in _runs(curve.low, joined=joined):
            upper = [point(i, v) for i in run if (v := curve.high[i]) is not None]
            lower = [point(i, v) for i in reversed(run) if (v := curve.low[i]) is not None]
            parts.append(f'<path class="band" d="{_path(upper + lower)}Z"/>')
    for run in _runs(curve.ys, joined=joined):
        points = [point(i, v) for i in run if (v := curve.ys[i]) is not None]
        if len(points) > 1:
            parts.append(f'<path class="line" d="{_path(points)}"/>')
        dots = points if joined or len(points) == 1 else points[-1:] if run[-1] == len(curve.ys) - 1 else []
        parts += [f'<circle class="dot" cx="{x}" cy="{y}" r="3.5"/>' for x, y in dots]
    tips = [_tip(curve, i, told=percent if percents else number) for i in range(len(curve.ys))]
    return _svg(frame, parts, label, tips)


def stacked_bars(rows: Sequence[dict[str, int]], order: Sequence[str], *, width: int, height: int, label: str) -> str:
    """Bars of shares, one per iteration, stacked from the bottom in `order`; a class out-<name> colours each."""
    frame = Frame(width, height)
    step = (frame.width - frame.left - frame.right) / max(len(rows), 1)
    gap = min(2.0, step * 0.2)
    parts = [
        _grid(frame, [0.0, 0.25, 0.5, 0.75, 1.0], 0.0, 1.0, shares=True),
        _iterations(frame, len(rows), centred=True),
    ]
    tips = []
    for i, row in enumerate(rows):
        total, base = sum(row.values()) or 1, 0
        for name in order:
            if count := row.get(name, 0):
                top, foot = frame.y((base + count) / total), frame.y(base / total)
                parts.append(
                    f'<rect class="out-{name}" x="{frame.left + i * step + gap / 2:.2f}" y="{top}" '
                    f'width="{step - gap:.2f}" height="{foot - top:.2f}"/>'
                )
                base += count
        told = ", ".join(f"{name.replace('_', ' ')} {row[name]}" for name in order if row.get(name))
        tips.append(f"Iteration {i}: {told}")
    return _svg(frame, parts, label, tips, centred=True)


def interval_chart(rows: Sequence[Interval], *, width: int, label: str) -> str:
    """Means as dots on their intervals, one row each, on a common scale from zero."""
    row_height, labels = 40, 132 if width < 500 else 150
    frame = Frame(width, row_height * len(rows) + 34, left=labels, right=58, top=4, bottom=28)
    ticks = nice_ticks(0.0, max((row.high for row in rows), default=1.0), count=3 if width < 500 else 5)
    parts = []
    for tick in ticks:
        x = frame.x(tick / ticks[-1])
        parts.append(
            f'<line class="grid" x1="{x}" x2="{x}" y1="{frame.top}" y2="{frame.height - frame.bottom}"/>'
            f'<text class="tick" x="{x}" y="{frame.height - 9}" text-anchor="middle">{tick_text(tick, ticks[1])}</text>'
        )
    for i, row in enumerate(rows):
        y = frame.top + row_height * (i + 0.5)
        low, mean, high = (frame.x(v / ticks[-1]) for v in (row.low, row.mean, row.high))
        tip = f"{row.label}: {number(row.mean)}, 95 % interval {number(row.low)} to {number(row.high)}"
        parts.append(
            f'<g class="{row.tone}"><title>{html.escape(tip)}</title>'
            f'<text class="row" x="{labels - 12}" y="{y + 4}" text-anchor="end">{html.escape(row.label)}</text>'
            f'<line class="range" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>'
            f'<circle class="mean" cx="{mean}" cy="{y}" r="5.5"/>'
            f'<text class="value" x="{high + 10}" y="{y + 4}">{number(row.mean)}</text></g>'
        )
    return _svg(frame, parts, label, [])


def tile_bars(
    shares: Mapping[int | str, float],
    tiles: Sequence[int | str],
    *,
    width: int,
    peak: float,
    tone: str,
    label: str,
    of: str = "games",
) -> str:
    """The share of games that ended with each largest tile, as bars over `tiles`; `peak` is the scale's top."""
    frame = Frame(width, 92, left=4, right=4, top=18, bottom=20)
    step = (frame.width - frame.left - frame.right) / max(len(tiles), 1)
    parts = [
        f'<line class="axis" x1="{frame.left}" x2="{frame.width - frame.right}" y1="{frame.y(0)}" y2="{frame.y(0)}"/>'
    ]
    for i, tile in enumerate(tiles):
        share = shares.get(tile, 0.0)
        middle = frame.left + (i + 0.5) * step
        if share > 0:
            top = frame.y(share / peak)
            parts.append(
                f'<g><title>{html.escape(str(tile))}: {100 * share:.1f} % of {of}</title><rect class="{tone}" '
                f'x="{middle - step * 0.38:.2f}" y="{top}" width="{step * 0.76:.2f}" '
                f'height="{frame.y(0) - top:.2f}" rx="2"/></g>'
                f'<text class="tick" x="{middle:.2f}" y="{top - 4}" text-anchor="middle">{_share(share)}</text>'
            )
        parts.append(
            f'<text class="tick" x="{middle:.2f}" y="{frame.height - 6}" text-anchor="middle">'
            f"{html.escape(str(tile))}</text>"
        )
    return _svg(frame, parts, label, [])


def nice_ticks(low: float, high: float, *, count: int) -> list[float]:
    """Round numbers that cover low..high in about `count` steps of 1, 2, 2.5 or 5 times a power of ten."""
    if low == high == 0:
        high = 1.0
    if not high > low:
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(unit for unit in (1.0, 2.0, 2.5, 5.0, 10.0) if unit * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def tick_text(tick: float, step: float) -> str:
    """A tick's label; all labels of an axis get the decimals that its step needs."""
    step = float(f"{step:.9g}")  # 1.0 - 0.9 is 0.09999999999999998
    if abs(tick) >= 1000 or step < 0.0005:
        return number(tick)
    decimals = next(count for count in range(12) if round(step, count) == step or count == 11)
    return f"{tick:.{decimals}f}".replace("-", "\u2212")


def _share(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.01 else "<1%"


def _tip(curve: Curve, i: int, *, told: Callable[..., str] = number) -> str:
    value = curve.ys[i]
    text = f"{curve.axis} {i}: {number(None) if value is None else told(value)}"
    if curve.low and curve.low[i] is not None:
        text += f" ({told(curve.low[i])} to {told(curve.high[i])})"
    return text


def _runs(values: Values, *, joined: bool = False) -> list[list[int]]:
    """The stretches of indices without a gap: [[0, 1], [3]] for [5, 6, None, 7], and [[0, 1, 3]] when joined."""
    if joined:
        return [[i for i, value in enumerate(values) if value is not None]]
    runs: list[list[int]] = [[]]
    for i, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append(i)
    return [run for run in runs if run]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _grid(frame: Frame, ticks: Sequence[float], bottom: float, span: float, *, shares: bool = False) -> str:
    parts = []
    for tick in ticks:
        y = frame.y((tick - bottom) / span)
        text = f"{100 * tick:.3g}%" if shares else tick_text(tick, ticks[1] - ticks[0])
        parts.append(
            f'<line class="grid" x1="{frame.left}" x2="{frame.width - frame.right}" y1="{y}" y2="{y}"/>'
            f'<text class="tick" x="{frame.left - 8}" y="{y + 3.5}" text-anchor="end">{text}</text>'
        )
    return "".join(parts)


def _iterations(frame: Frame, count: int, *, centred: bool = False) -> str:
    """Labels of the iteration axis: whole numbers only, the last one always, none that would touch."""
    room = max(2, (frame.width - frame.left) // 55)
    step = max(1, math.ceil(max(count - 1, 1) / room))
    step = next(s for p in range(9) for s in (10**p, 2 * 10**p, 5 * 10**p) if s >= step)
    marks = [i for i in range(0, count, step) if count - 1 - i >= step * 0.6 or i == count - 1]
    marks += [count - 1] if count and count - 1 not in marks else []
    parts = []
    for i in marks:
        x = frame.x((i + 0.5) / count if centred else i / max(count - 1, 1))
        parts.append(f'<text class="tick" x="{x}" y="{frame.height - 8}" text-anchor="middle">{i}</text>')
    return "".join(parts)


def _svg(frame: Frame, parts: Sequence[str], label: str, tips: Sequence[str], *, centred: bool = False) -> str:
    pointing = ""
    if tips:
        pointing = (
            f' tabindex="0" data-left="{frame.left}" data-right="{frame.right}" data-centred="{int(centred)}" '
            f'data-tips="{html.escape(json.dumps(list(tips), ensure_ascii=False))}"'
        )
    return (
        f'<svg class="chart" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="{html.escape(label)}"{pointing}>{"".join(parts)}</svg>'
    )
