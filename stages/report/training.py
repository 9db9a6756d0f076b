"""The sections about training: verdict, reward, outcomes, the updates, time spent, settings. Contents in, HTML out.

A section with nothing to show is an empty string. Every text that a model or a person wrote goes through `escape`.
"""

import json
from collections.abc import Iterable
from html import escape

from stages.artifacts.history import Iteration
from stages.report.charts import Curve, line_chart, stacked_bars
from stages.report.checks import SHOWN, share
from stages.report.contents import Contents, Cost
from stages.report.figures import capital, duration, fixed, number, percent, percents, size, words
from stages.report.layout import card, in_widths, section, table
from stages.report.verdict import interval, reward_ends, standing, verdict

OUTCOMES = ("ok", "no_program", "syntax_error", "foreign_import", "cheat", "timeout", "memory", "crash", "output_limit")


def header(contents: Contents) -> str:
    """The verdict in words and four tiles with its numbers."""
    told = verdict(contents)
    about = " &middot; ".join(escape(text) for text in (contents.task, contents.model, contents.preset) if text)
    headline = escape(told.headline)
    if told.key:
        headline = headline.replace(escape(told.key), f"<em>{escape(told.key)}</em>", 1)
    return (
        f'<header class="{told.tone}"><p class="over"><b>{escape(contents.name)}</b> &middot; {about}</p>'
        f'<h1>{headline}</h1><p class="evidence">{escape(" ".join(told.sentences))}</p>{_tiles(contents)}</header>'
    )


def learning(contents: Contents) -> str:
    """The reward over iterations with its band."""
    rows = contents.iterations
    if not rows:
        return ""
    low, high = [row.reward_low for row in rows], [row.reward_high for row in rows]
    curve = Curve("reward", [row.reward for row in rows], low, high)
    label = f"Mean reward per iteration, from {number(rows[0].reward)} to {number(rows[-1].reward)}"
    return section(
        "The reward over training",
        "Mean over the completions of an iteration; the band holds the middle half of them.",
        card(in_widths(lambda w: line_chart(curve, width=w, height=300 if w > 400 else 230, label=label)))
        + _parts(rows),
    )


def _parts(rows: list[Iteration]) -> str:
    """A small curve for each reward function; their sum is the reward."""
    cards = []
    for name in rows[0].parts:
        curve = Curve(name, [row.parts.get(name) for row in rows])
        if any(value for value in curve.ys):
            chart = line_chart(curve, width=330, height=140, label=_trend(words(name), curve))
            cards.append(card(chart, title=escape(capital(words(name)))))
    return f'<div class="grid parts">{"".join(cards)}</div>' if len(cards) > 1 else ""


def outcomes(contents: Contents) -> str:
    """How the programs ended, stacked per iteration."""
    if not contents.iterations:
        return ""
    rows = [iteration.outcomes for iteration in contents.iterations]
    present = [name for name in OUTCOMES if any(row.get(name) for row in rows)]
    legend = "".join(f'<li><i class="out-{name}"></i>{words(name)}</li>' for name in present)
    first, last = (percent(row.get("ok", 0), sum(row.values())) for row in (rows[0], rows[-1]))
    label = f"Share of outcomes per iteration; ok went from {first} to {last}"

    def draw(width: int) -> str:
        return stacked_bars(rows, present, width=width, height=240 if width > 400 else 210, label=label)

    return section(
        "What became of the programs",
        "Each completion ends in exactly one outcome.",
        card(f'<ul class="legend">{legend}</ul>{in_widths(draw)}'),
    )


def inside(contents: Contents) -> str:
    """Small curves of what the sampling and the updates did, and every number in a table."""
    rows = contents.iterations
    if not rows:
        return ""

    def metric(name: str) -> Curve:
        return Curve(name, [row.metrics.get(name) for row in rows])

    tokens = Curve("tokens", [r.tokens for r in rows], [r.tokens_low for r in rows], [r.tokens_high for r in rows])
    silent = Curve("silent", [row.silent_groups / max(row.groups, 1) for row in rows])
    charts = [
        ("Completion length", "Tokens; the band holds the middle half.", tokens),
        ("Entropy", "Nats per token: how undecided the policy is.", metric("entropy")),
        ("KL", "To the policy without its adapter, in nats per token.", metric("kl")),
        ("Engine against trainer", "KL of their logprobs of the same tokens, in nats per token.", metric("engine_kl")),
        ("Clip fraction", "Share of tokens whose ratio was clipped.", metric("clip_fraction")),
        ("Gradient norm", "Before clipping.", metric("grad_norm")),
        ("Groups with no signal", "Share of groups whose rewards are all equal.", silent),
    ]
    cards = "".join(
        card(
            line_chart(curve, width=330, height=170, label=_trend(title, curve), from_zero=True), title=title, note=note
        )
        for title, note, curve in charts
        if any(value is not None for value in curve.ys)
    )
    return section(
        "Inside the updates",
        "One value an iteration, averaged over its optimizer steps.",
        f'<div class="grid">{cards}</div>{_numbers(rows)}',
    )


def timings(contents: Contents) -> str:
    """Where the time went, by stage and by kind of work."""
    total = sum(cost.seconds for cost in contents.costs)
    if not total:
        return ""
    shares = {cost.stage: percent(cost.seconds, total) for cost in contents.costs}
    told = "Time by stage: " + ", ".join(f"{stage} {share}" for stage, share in shares.items())
    bar = "".join(
        f'<i class="spent-{cost.stage}" style="flex:{cost.seconds / total:.5f}" '
        f'title="{cost.stage} {shares[cost.stage]}"></i>'
        for cost in contents.costs
    )
    measured = any(cost.peak_bytes for cost in contents.costs)
    rows = [row for cost in contents.costs for row in _costs(cost, total, memory=measured)]
    return section(
        "Where the time went",
        f"{duration(total)} in stages, all iterations together.",
        card(
            f'<div class="spent" role="img" aria-label="{told}">{bar}</div>'
            + table(["Stage", "Time", "Share", "Tokens/s", *(["Peak memory"] if measured else [])], rows)
        ),
    )


def exports(contents: Contents) -> str:
    """The exported models and what they kept of what was learned."""
    rows = []
    for export in contents.exports:
        kept = [export.gain_kept, export.with_residual]
        told = " ".join(
            f"{percent(share)}{note}"
            for share, note in zip(kept, ("", " with its residual"), strict=True)
            if share is not None
        )
        cells = (size(export.bytes), number(export.kl), number(export.score), told or "\u2013")
        rows.append(
            f'<tr><th scope="row">{escape(export.format)}</th>' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
        )
    if not rows:
        return ""
    named = contents.words
    return section(
        "Exported",
        f"Each was loaded again by transformers and {named.met} the held-out {named.cases}; "
        "KL is to the trained policy, per token.",
        card(table(["Format", "Weights", "KL", capital(named.score), "Gain kept"], rows)),
    )


def settings(contents: Contents) -> str:
    """The resolved configuration and the environment, folded away."""
    parts = []
    for title, record in (("Configuration", contents.config), ("Environment", contents.environment)):
        if record:
            text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False)
            parts.append(f'<details><summary>{title}</summary><pre tabindex="0">{escape(text)}</pre></details>')
    return section("How it was run", "", "".join(parts)) if parts else ""


def _tiles(contents: Contents) -> str:
    tiles = []
    before, after, named = contents.before, contents.after, contents.words
    if ends := reward_ends(contents.iterations):
        first, last, averaged = ends
        note = f"mean of the first and the last {averaged} iterations" if averaged > 1 else "first and last iteration"
        tiles.append(_tile("Reward", fixed(first), fixed(last), note))
    elif contents.iterations:
        tiles.append(_tile("Reward", "", fixed(contents.iterations[0].reward), "first iteration"))
    if before and after:
        score = f"95&nbsp;% intervals {interval(before)} and {interval(after)}"
        tiles.append(_tile(f"{capital(named.score)}, held out", number(before.score), number(after.score), score))
        for (title, _), start, end in zip(named.shares, before.shares, after.shares, strict=True):
            ranges = " and ".join(percents(share.low, share.high) for share in (start, end))
            note = f"95&nbsp;% intervals {ranges}"
            tiles.append(_tile(capital(title), percent(start.value), percent(end.value), note))
    elif before:
        score = f"95&nbsp;% interval {interval(before)}"
        tiles.append(_tile(f"{capital(named.score)}, untrained", "", number(before.score), score))
    judged = after or before
    if judged and contents.baselines:
        items = "".join(
            f"<li>{escape(other.label)} <span>{number(other.score)}</span>"
            f'<b class="{place.split()[0]}">{place.split()[0]}</b></li>'
            for other in contents.baselines
            for place in (standing(judged, other),)
        )
        tiles.append(card(f"<ul>{items}</ul>", title="Against baselines"))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _tile(title: str, first: str, last: str, note: str) -> str:
    start = f'<span class="from">{first} &rarr; </span>' if first else ""
    return card(f'<div>{start}<span class="to">{last}</span></div><p class="note">{note}</p>', title=title)


def _costs(cost: Cost, total: float, *, memory: bool) -> Iterable[str]:
    speed = number(cost.tokens_per_s) if cost.tokens_per_s else ""
    cells = [duration(cost.seconds), percent(cost.seconds, total), speed, *([size(cost.peak_bytes)] if memory else [])]
    yield (
        f'<tr><th scope="row"><i class="swatch spent-{cost.stage}"></i>{cost.stage}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
    )
    for what, seconds in cost.parts.items():
        cells = [duration(seconds), percent(seconds, total), "", *([""] if memory else [])]
        yield (
            f'<tr><td class="text"><small>&emsp;{escape(what)}</small></td>'
            + "".join(f"<td><small>{cell}</small></td>" for cell in cells)
            + "</tr>"
        )


def _numbers(rows: list[Iteration]) -> str:
    names = sorted({name for row in rows for name in row.metrics})
    parts = list(rows[0].parts)
    checks = [(name, answer, title) for name, answer, title, _ in SHOWN if any(row.checks.get(name) for row in rows)]
    body = [
        f'<tr><th scope="row">{row.index}</th><td>{number(row.reward)}</td><td>{number(row.spread)}</td>'
        f"<td>{percent(row.outcomes.get('ok', 0), row.completions)}</td><td>{number(row.tokens)}</td>"
        f"<td>{percent(row.truncated)}</td>"
        + "".join(f"<td>{number(row.parts.get(name))}</td>" for name in parts)
        + "".join(f"<td>{_share(row, *check)}</td>" for check in checks)
        + "".join(f"<td>{number(row.metrics.get(name))}</td>" for name in names)
        + "</tr>"
        for row in rows
    ]
    heads = ["iteration", "reward", "spread", "ok", "tokens", "truncated", *(escape(words(name)) for name in parts)]
    heads += [title.lower() for _, _, title in checks] + [escape(words(name)) for name in names]
    return (
        '<details class="more"><summary>The numbers, iteration by iteration</summary>'
        f"{card(table(heads, body))}</details>"
    )


def _share(row: Iteration, name: str, answer: str, title: str) -> str:
    known = share(row, name, answer)
    return number(None) if known is None else percent(known)


def _trend(title: str, curve: Curve) -> str:
    known = [value for value in curve.ys if value is not None]
    return f"{title} per iteration, from {number(known[0])} to {number(known[-1])}"
