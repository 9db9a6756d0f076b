"""The sections about playing: held-out games against baselines, replayed games, programs. Contents in, HTML out.

A section with nothing to show is an empty string. Every text that a model or a person wrote goes through `escape`.
"""

from collections.abc import Iterable
from html import escape

from stages.report.charts import Curve, Interval, interval_chart, line_chart, tile_bars
from stages.report.checks import chips
from stages.report.contents import Achieved, Contents, Game, Player, Program
from stages.report.figures import capital, fixed, number, percent, percents, words
from stages.report.highlight import python_to_html
from stages.report.layout import card, in_halves, section, table
from stages.report.verdict import interval

TILES_SHOWN = 10  # columns of the largest-tile histogram: 4 to 2048 on the standard board


def held_out(contents: Contents) -> str:
    """Scores against baselines, largest tiles, and the table of evaluations."""
    shown = [player for player in (contents.before, contents.after) if player]
    players = sorted([*shown, *contents.baselines], key=lambda player: -player.score)
    if not players:
        return ""
    words = contents.words
    rows = [Interval(p.label, p.score, p.score_low, p.score_high, _tone(contents, p)) for p in players]
    scores = card(
        in_halves(lambda width: interval_chart(rows, width=width, label=_spoken(contents, players))),
        title=capital(words.score),
        note=f"Bars are 95&nbsp;% intervals: over programs, for a baseline over {words.cases}.",
    )
    return section(
        f"On {words.cases} it never saw",
        f"Programs sampled from the model {words.meet} seeds that training never uses; "
        f"the baselines {words.meet} the same {words.cases}.",
        f'<div class="pair"><div class="stack">{scores}{_progress(contents)}</div>'
        f"{_histograms(contents, players)}</div>"
        f"{_evaluations(contents)}",
    )


def in_training(contents: Contents) -> str:
    """The task's own figures of the programs of training, iteration by iteration."""
    shown = [each for each in contents.achieved if any(value is not None for value in each.mean)]
    if not shown:
        return ""
    cards = "".join(_achieved(each) for each in shown)
    return section(
        "What the programs of training achieved",
        f"Means over the completions of an iteration, on its own {contents.words.cases}; "
        "a completion without a program that works counts as 0.",
        f'<div class="pair">{cards}</div>',
    )


def _achieved(figure: Achieved) -> str:
    curve = Curve(figure.title, figure.mean, figure.low, figure.high)
    known = [value for value in figure.mean if value is not None]
    told = percent if figure.share else number
    label = f"{capital(figure.title)} per iteration, from {told(known[0])} to {told(known[-1])}"
    note = capital(figure.unit) + ("." if figure.share else "; the band holds the middle half.")

    def draw(width: int) -> str:
        return line_chart(curve, width=width, height=220, label=label, from_zero=True, percents=figure.share)

    return card(in_halves(draw), title=escape(capital(figure.title)), note=escape(note))


def replays(contents: Contents) -> str:
    """Recorded games, replayed move by move; the script fills the board."""
    if not contents.games:
        return ""
    choices = "".join(_choice(i, game) for i, game in enumerate(contents.games))
    programs = "".join(
        f'<div data-program="{i}"{" hidden" if i else ""}><p class="results">{escape(game.completion_id)}</p>'
        f'<pre tabindex="0" aria-label="The program that played">{python_to_html(game.program)}</pre></div>'
        for i, game in enumerate(contents.games)
    )
    return section(
        "A game, move by move",
        "The letters a program played were recorded when it was judged; the rules and the seed give the same tiles "
        "again. Nothing a model wrote runs here.",
        f'<div class="card replay" id="replay">{PLAYER}<div><div class="choices">{choices}</div>{programs}</div></div>'
        "<noscript><p>The replay needs JavaScript.</p></noscript>",
    )


def programs(contents: Contents) -> str:
    """The best and the worst programs of the run."""
    if not contents.best:
        return ""
    columns = [("Best", contents.best), ("Worst", contents.worst)]
    body = "".join(
        f'<div><h3 class="lead">{title}</h3>{"".join(map(_program, shown))}</div>' for title, shown in columns if shown
    )
    return section(
        "Best and worst programs",
        "Different programs only, by their reward in training.",
        f'<div class="pair">{body}</div>',
    )


def _tone(contents: Contents, player: Player) -> str:
    return "after" if player is contents.after else "before" if player is contents.before else "other"


def _spoken(contents: Contents, players: Iterable[Player]) -> str:
    return f"{capital(contents.words.score)}: " + ", ".join(
        f"{p.label} {number(p.score)} ({interval(p)})" for p in players
    )


def _progress(contents: Contents) -> str:
    """The held-out score over updates, once there is a point between the first and the last."""
    points = {player.updates: player for player in contents.policies if player.updates is not None}
    if len(points) < 3:
        return ""
    marks = [points.get(update) for update in range(max(points) + 1)]
    curve = Curve(
        "score",
        [mark.score if mark else None for mark in marks],
        [mark.score_low if mark else None for mark in marks],
        [mark.score_high if mark else None for mark in marks],
        axis="Update",
    )
    score, cases = contents.words.score, contents.words.cases
    label = f"Held-out {score} over updates"
    return card(
        in_halves(lambda w: line_chart(curve, width=w, height=250, label=label, from_zero=True, joined=True)),
        title=f"{capital(score)} over updates",
        note=f"The same held-out {cases} after more and more updates, with 95&nbsp;% intervals.",
    )


def _histograms(contents: Contents, players: list[Player]) -> str:
    words = contents.words
    tiles: list[int | str] = list(words.bins)
    if not tiles:
        tiles += sorted({tile for player in players for tile in player.tiles if isinstance(tile, int)})[-TILES_SHOWN:]
    if not tiles or not any(player.tiles for player in players):
        return ""
    if words.bins:  # of programs: a baseline is one, which has no histogram
        players = [player for player in players if player.updates is not None]
    shares = [{tile: count / max(sum(p.tiles.values()), 1) for tile, count in p.tiles.items()} for p in players]
    peak = max(max(share.values(), default=0.0) for share in shares) or 1.0
    rows = []
    for player, share in zip(players, shares, strict=True):
        label = f"{player.label}: " + ", ".join(f"{tile} in {100 * share.get(tile, 0):.0f} %" for tile in tiles)
        tone = _tone(contents, player)
        chart = tile_bars(share, tiles, width=340, peak=peak, tone=tone, label=label, of=escape(words.tallied))
        head = (
            f"<div><b>{escape(player.label)}</b><span>{sum(player.tiles.values())} {escape(words.tallied)}</span></div>"
        )
        rows.append(f'<div class="hist">{head}{chart}</div>')
    return card("".join(rows), title=escape(words.tally), note=escape(words.tally_note))


def _evaluations(contents: Contents) -> str:
    words = contents.words
    tiles = not words.bins and any(player.tiles for player in contents.policies)
    rows = [
        f"<tr{' class=mine' if player is contents.after else ''}><th scope=row>{escape(player.label)}</th>"
        f"<td>{number(player.score)} <small>{interval(player)}</small></td>"
        + "".join(
            f"<td>{percent(share.value)} <small>{percents(share.low, share.high)}</small></td>"
            for share in player.shares
        )
        + (f"<td>{max(map(int, player.tiles), default=0) or ''}</td>" if tiles else "")
        + f"<td>{player.programs} <small>{player.distinct_programs} distinct</small></td><td>{player.cases}</td></tr>"
        for player in [*contents.policies, *contents.baselines]
    ]
    heads = [capital(words.player), capital(words.score), *(capital(short) for _, short in words.shares)]
    heads += [*(["Largest tile"] if tiles else []), "Programs", capital(words.cases)]
    return card(table(heads, rows), more="more")


def _choice(index: int, game: Game) -> str:
    record = game.replay
    return (
        f'<button type="button" data-game="{index}" aria-pressed="false">{escape(game.title)}<span>'
        f"score {number(record.score)}, largest tile {record.max_tile}, {escape(words(record.state))} after "
        f"{number(len(record.moves) // 3)} moves, seed {record.seed}</span></button>"
    )


def _program(program: Program) -> str:
    rewards = ", ".join(f"{words(name)} {fixed(value)}" for name, value in program.rewards.items())
    if program.source:
        source = f'<pre tabindex="0" aria-label="Program">{python_to_html(program.source)}</pre>'
    else:
        source = '<p class="detail">No program was found in the completion.</p>'
    played = f'<p class="results">{escape(program.results)}</p>' if program.results else ""
    detail = f'<p class="detail">{escape(program.detail)}</p>' if program.detail else ""
    kept = f'<p class="detail">May keep state: {escape(program.state_kept)}</p>' if program.state_kept else ""
    cases = ""
    if program.cases:
        heads, *rows = program.cases
        body = ["<tr>" + "".join(f"<td>{escape(each)}</td>" for each in row) + "</tr>" for row in rows]
        cases = f'<div class="cases">{table([escape(head) for head in heads], body)}</div>'
    outcome = escape(program.outcome)
    return (
        f'<article class="card program"><header><strong>{fixed(program.reward)}</strong><span class="chip">'
        f'<i class="out-{outcome}"></i>{words(outcome)}</span><span>{escape(rewards)}</span>'
        f"<code>{escape(program.completion_id)}</code></header>{source}{played}{detail}{chips(program)}{kept}{cases}</article>"
    )


def _icon(path: str, kind: str = "") -> str:
    return f'<svg{kind} viewBox="0 0 18 18" aria-hidden="true"><path d="{path}"/></svg>'


def _button(name: str, label: str, path: str, busy: str = "") -> str:
    icons = _icon(path) + (_icon(busy, ' class="busy"') if busy else "")
    return f'<button type="button" id="{name}" aria-label="{label}" title="{label}">{icons}</button>'


PLAYER = (
    '<div class="player" id="player"><div class="facts"><span>Score<b id="score">0</b></span>'
    '<span>Largest<b id="largest">0</b></span><span>Move<b id="move">0</b></span>'
    '<span>Last<b id="letter"></b></span></div><div class="board" id="board" role="img" tabindex="0">'
    '<div class="cells" id="cells"></div><div class="pieces" id="pieces"></div></div>'
    '<input type="range" id="slider" min="0" value="0" aria-label="Move"><div class="controls">'
    + _button("first", "First move", "M3 3h2.5v12H3zM15 3v12L6.5 9z")
    + _button("back", "One move back", "M13 3v12L4.5 9z")
    + _button("play", "Play", "M4 2.5v13L15 9z", "M4 3h3.6v12H4zM10.4 3H14v12h-3.6z")
    + _button("forward", "One move forward", "M5 3v12l8.5-6z")
    + _button("last", "Last move", "M3 3v12l8.5-6zM12.5 3H15v12h-2.5z")
    + '<select id="speed" aria-label="Speed"><option value="3">3 moves/s</option><option value="8" selected>8 moves/s'
    '</option><option value="30">30 moves/s</option><option value="90">90 moves/s</option></select></div>'
    '<p class="hint">Space plays, arrow keys step, Home and End jump.</p>'
    '<p id="said" role="status" class="hint"></p></div>'
)
