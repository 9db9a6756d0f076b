"""Tables and panels for the terminal. Records in, printed text out.

What a model wrote is printed as plain text with its control characters made visible: a completion can neither colour
nor move the terminal's cursor, nor use rich's markup.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from stages.artifacts.run import RunDir
from stages.config import pasteable
from stages.tasks import registry
from stages.tasks.base import Figure, Task
from stages.tasks.checks import COLUMNS

WIDE = 130  # columns where the output is no terminal
BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
UNLIKELY = math.log(0.1)
LONGEST = 60  # lines of a program shown in a list; --completion shows all


def console() -> Console:
    """Where tables go; wide when nobody watches."""
    output = Console(highlight=False)
    return output if output.is_terminal else Console(highlight=False, width=WIDE)


def print_answer(run: RunDir, answer: dict[str, Any]) -> None:
    """The overview, or one iteration, or the completions that were asked for."""
    out = console()
    task = registry.of(run.config())
    if "iterations" in answer:
        config = run.config()
        done = f"{len(answer['iterations'])} of {config.train.iterations} iterations scored"
        out.print(Text.assemble((str(run.path), "bold"), f"  {config.task.name}, preset {config.preset}, {done}"))
        if answer["iterations"]:
            out.print(iterations(answer["iterations"], width=out.width))
        if answer["evaluations"]:
            out.print(evaluations(answer["evaluations"], task, width=out.width))
        if not answer["iterations"] and not answer["evaluations"]:
            out.print(f"Nothing has been scored yet; go on with: {pasteable('flexsink', 'resume', run.path)}")
    if "iteration" in answer:
        out.print(iterations([answer["iteration"]], width=out.width))
        out.print(Text(dependence(answer["iteration"]["checks"]), style="dim"))
        out.print(groups(answer["groups"], width=out.width))
    if "completions" in answer:
        for row in answer["completions"]:
            print_completion(row, task=task, whole=False, out=out)
        if not answer["completions"]:
            out.print("No completion matches.")


def print_completion(row: dict[str, Any], *, task: Task, whole: bool, out: Console | None = None) -> None:
    """One completion: its verdict, program and cases; the prompt and the raw text too when `whole`."""
    parts: list[RenderableType] = [facts(row, task=task, whole=whole)]
    if whole:
        found = evidence(row)
        if found.plain:
            parts += [Rule("evidence", style="dim"), found]
        if row.get("prompt"):
            parts += [Rule("prompt", style="dim"), Text(printable(row["prompt"]))]
        if row.get("completion"):
            parts += [Rule("completion", style="dim"), Text(printable(row["completion"]))]
    if row.get("program"):
        parts += [Rule("program", style="dim"), program(row["program"], whole=whole)]
    if row[task.cases]:
        parts += [Rule(task.cases, style="dim"), cases(row[task.cases], task)]
    title = Text.assemble((row.get("completion_id") or row.get("name", ""), "bold"))
    (out or console()).print(Panel(Group(*parts), title=title, title_align="left", border_style="dim"))


def print_tokens(rows: list[dict[str, Any]]) -> None:
    """One line per token: its text and its logprobs, the unlikely ones marked."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("#", "id", "token", "engine", "chance", "trainer", "reference"):
        table.add_column(name, justify="left" if name == "token" else "right", no_wrap=True)
    for at, row in enumerate(rows, start=1):
        engine = row["engine"]
        chance = "" if engine is None else f"{100 * math.exp(engine):.3g} %"
        unlikely = engine is not None and engine < UNLIKELY
        others = ("" if row[name] is None else f"{row[name]:.4f}" for name in ("trainer", "reference"))
        figures = ("" if engine is None else f"{engine:.4f}", chance, *others)
        table.add_row(str(at), str(row["id"]), Text(ascii(row["text"])), *figures, style="yellow" if unlikely else "")
    console().print(table if rows else "No tokens are kept of this completion.")


def iterations(rows: Iterable[dict[str, Any]], *, width: int = WIDE) -> Table:
    """One line per iteration; a narrow terminal gets the columns that matter most."""
    columns = [
        "iteration",
        "completions",
        "reward",
        "25 to 75 %",
        "spread",
        "ok",
        "no signal",
        "tokens",
        "cut off",
        "kl",
    ]
    if width < 118:
        columns = [name for name in columns if name not in ("25 to 75 %", "cut off", "kl")]
    if width < 100:
        columns.remove("completions")
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("other outcomes")
    for row in rows:
        kl = row["metrics"].get("kl")
        cells: dict[str, str | Text] = {
            "iteration": str(row["index"]),
            "completions": str(row["completions"]),
            "reward": Text.assemble((f"{row['reward']:.2f}", "bold"), (f" \u00b1{row['reward_error']:.2f}", "dim")),
            "25 to 75 %": f"{row['reward_low']:.2f} to {row['reward_high']:.2f}",
            "spread": f"{row['spread']:.2f}",
            "ok": f"{100 * row['outcomes'].get('ok', 0) / row['completions']:.0f} %",
            "no signal": f"{row['silent_groups']} of {row['groups']}",
            "tokens": f"{row['tokens']:.0f}",
            "cut off": f"{100 * row['truncated']:.0f} %",
            "kl": "" if kl is None else f"{kl:.4f}",
        }
        others = {name: count for name, count in row["outcomes"].items() if name != "ok"}
        table.add_row(*(cells[name] for name in columns), told(others, most=2))
    return table


def evaluations(rows: Iterable[dict[str, Any]], task: Task, *, width: int = WIDE) -> Table:
    """One line per policy or baseline of every evaluation; baselines once, as they are the same each time. A narrow
    terminal gets no counts of programs and cases.
    """
    table = Table(box=None, header_style="dim", pad_edge=False, title=f"\nheld-out {task.cases}", title_justify="left")
    first, *others = task.figures
    heads = [task.player, first.title, "95 % interval", *(each.short or each.title for each in others)]
    counts = {"programs": "programs", "distinct": "distinct_programs", task.cases: task.cases} if width >= 100 else {}
    heads += [*counts, *([task.tally.title] if task.tally else [])]
    for name in heads:
        table.add_column(name, justify="left" if name == task.player else "right", no_wrap=True)
    unique = {(row["kind"], row["name"], row["updates"] if row["kind"] == "policy" else None): row for row in rows}
    for (_, _, updates), row in sorted(unique.items(), key=lambda item: (item[0][0] != "policy", item[0][2] or 0)):
        label = player(row, updates)
        low, high = (shown(first, row[first.name + end]) for end in ("_low", "_high"))
        largest = (
            [max((entry[task.tally.value] for entry in row[task.tally.name] or []), default="")] if task.tally else []
        )
        table.add_row(
            printable(label),
            Text(shown(first, row[first.name]), style="bold"),
            f"{low} to {high}",
            *(shown(each, row[each.name]) for each in others),
            *(str(row[name]) for name in counts.values()),
            *map(str, largest),
        )
    return table


def player(row: Mapping[str, Any], updates: int | None) -> str:
    """Who a row of an evaluation is about: untrained, after 24 updates, or the baseline's name."""
    if row["kind"] != "policy":
        return str(row["name"]).replace("_", " ")
    return f"after {updates} updates" if updates else "untrained"


def strip(values: Sequence[float], low: float, high: float, *, width: int = 20) -> str:
    """Where the values lie between `low` and `high`: a block's height is how many of them lie there."""
    counts = [0] * width
    for value in values:
        share = (value - low) / (high - low) if high > low else 0.0
        counts[max(0, min(width - 1, int(share * width)))] += 1
    most = max(counts, default=0) or 1
    return "".join(BLOCKS[-(-count * 8 // most)] for count in counts)


def shown(figure: Figure, value: float, *, digits: int = 1) -> str:
    """A figure's value as text, a share in per cent with so many digits."""
    return f"{100 * value:.{digits}f} %" if figure.share else f"{value:.{figure.digits}f}"


def groups(rows: Iterable[dict[str, Any]], *, width: int = WIDE) -> Table:
    """One line per group of an iteration; a narrow terminal gets no ids, but their last part."""
    rows = list(rows)
    low = min((row["worst"]["reward"] for row in rows), default=0.0)
    high = max((row["best"]["reward"] for row in rows), default=0.0)
    table = Table(box=None, header_style="dim", pad_edge=False, title="\ngroups", title_justify="left")
    narrow = width < 118
    for name in ("group", "of", "mean", "spread", f"{low:.1f} to {high:.1f}", "best", "worst", "outcomes"):
        left = name not in ("group", "of", "mean", "spread")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "outcomes")
    for row in rows:
        table.add_row(
            str(row["group"]),
            str(row["completions"]),
            Text(f"{row['mean']:.2f}", style="bold"),
            f"{row['spread']:.2f}",
            strip(row["rewards"], low, high, width=16),
            *(
                f"{each['reward']:5.2f}  {each['completion_id'][9:] if narrow else each['completion_id']}"
                for each in (row["best"], row["worst"])
            ),
            Text.assemble(told(row["outcomes"]), ("  no signal" if row["silent"] else "", "yellow")),
        )
    return table


def cases(rows: Iterable[dict[str, Any]], task: Task) -> Table:
    """One line per case, without what only a replay reads."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    names = [name for name in task.case_columns if name != task.recording]
    for name in names:
        table.add_column(name.replace("_", " "), justify="left" if name == "state" else "right")
    for case in rows:
        good = "green" if case.get("state") in task.good_states else ""
        table.add_row(*(Text(cell(case[name]), style=good if name == "state" else "") for name in names))
    return table


def cell(value: Any) -> str:
    """A case's value: nothing for None, three digits of a float, words for a state."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else printable(str(value).replace("_", " "))


def facts(row: dict[str, Any], *, task: Task, whole: bool) -> Text:
    """The verdict; its evidence in brief, or with `whole`, beside `evidence`, what is known about the tokens."""
    text = Text()
    if "reward" in row:
        parts = ", ".join(
            f"{name.removeprefix('reward_').replace('_', ' ')} {row[name]:.2f}"
            for name in row
            if name.startswith("reward_")
        )
        text.append(f"reward {row['reward']:.2f}", style="bold").append(f"  ({parts})  ")
    elif task.figures[0].name in row:
        first, *others = task.figures
        text.append(f"{first.title} {shown(first, row[first.name])}", style="bold")
        for each in others:
            text.append(f"  {each.short or each.title} {shown(each, row[each.name], digits=0)}")
        text.append("  ")
    text.append(row["outcome"].replace("_", " "), style="green" if row["outcome"] == "ok" else "red")
    if not whole:
        if row.get("detail"):
            text.append(f": {printable(row['detail'])}")
        if any(row.get(name) is not None for name in COLUMNS):
            text.append(f"\n{checked(row)}", style="dim")
        if row.get("state_kept"):
            text.append(f"\nmay keep state between calls: {printable(row['state_kept'])}", style="yellow")
    if "finish_reason" in row:
        text.append(f"\n{row['num_tokens']} tokens, ended by {row['finish_reason']}", style="dim")
        text.append(f", policy after {row['policy_version']} updates, seed {row['seed']}", style="dim")
    if whole and "logprobs" in row:
        logprobs = row["logprobs"]
        text.append(
            f"\nengine logprobs: mean {logprobs['mean']:.3f} nat, lowest {logprobs['lowest']:.3f} at token "
            f"{logprobs['lowest_at']}",
            style="dim",
        )
    if whole and "advantage" in row:
        text.append(f"\nadvantage {row['advantage']:+.3f}", style="dim")
    return text


def checked(row: dict[str, Any]) -> str:
    """What the answers depend on, in words: "depends on board: yes, calls: no, random: no, time: no"."""
    words = {True: "yes", False: "no", None: "unknown"}
    depends = "depends_on_"
    answers = [f"{name.removeprefix(depends)}: {words[row.get(name)]}" for name in COLUMNS if name.startswith(depends)]
    return "depends on " + ", ".join(answers)


def coloured(text: str, language: str) -> Syntax:
    """The text with its syntax coloured, on the terminal's own background; long lines go on below."""
    return Syntax(text, language, theme="ansi_dark", background_color="default", word_wrap=True)


def program(source: str, *, whole: bool) -> RenderableType:
    """The program with its syntax coloured; a long one is cut unless `whole`."""
    lines = printable(source).rstrip("\n").split("\n")
    cut = [] if whole else lines[LONGEST:]
    shown = coloured("\n".join(lines[: len(lines) - len(cut)]), "python")
    return Group(shown, Text(f"... {len(cut)} more lines", style="dim")) if cut else shown


CHECKS = {
    "depends_on_board": ("other inputs get other answers", "its answers do not depend on what it is given"),
    "depends_on_calls": ("equal inputs get other answers at another call", "equal inputs get equal answers"),
    "depends_on_random": ("random numbers alone make the difference", "random numbers make no difference"),
    "depends_on_time": ("it may read a clock", "it has no clock"),
}  # a check's name: what yes means, what no means


def evidence(row: dict[str, Any]) -> Text:
    """What was found out about the program beside its score, a line each; unknown is said where something is known."""
    text = Text()
    if row.get("detail"):
        text.append(f"{printable(row['detail'])}\n", style="red" if row.get("outcome") != "ok" else "")
    if any(row.get(name) is not None for name in CHECKS):
        for name, (yes, no) in CHECKS.items():
            value = row.get(name)
            words = "unknown" if value is None else f"yes: {yes}" if value else f"no: {no}"
            text.append(f"{name.replace('_', ' '):<18}", style="dim")
            text.append(f"{words}\n", style="yellow" if odd(name, value) else "")
    if row.get("state_kept"):
        text.append(f"may keep state between calls: {printable(row['state_kept'])}\n", style="yellow")
    text.rstrip()
    return text


def dependence(checks: Mapping[str, Mapping[str, int]]) -> str:
    """What the programs of an iteration that ended ok depend on, in words; empty where nothing is known of them."""
    told = []
    for name, answer, words in (
        ("depends_on_board", "no", "ignore their input"),
        ("depends_on_random", "yes", "draw random numbers"),
        ("depends_on_time", "yes", "may read a clock"),
        ("state_kept", "yes", "may keep state"),
    ):
        counts = checks.get(name, {})
        known = counts.get("yes", 0) + counts.get("no", 0)
        if known:
            told.append(f"{counts[answer]} of {known} {words}")
    return f"programs that ended ok: {', '.join(told)}" if told else ""


def odd(check: str, value: bool | None) -> bool:
    """Whether a check's answer is one to look at: a program that ignores its input, or may read a clock."""
    return (check == "depends_on_board" and value is False) or (check == "depends_on_time" and value is True)


def told(counts: dict[str, int], *, most: int = 9) -> str:
    """Counts in words, the largest first: 3 syntax error, 1 cheat; what is beyond `most` names is summed up as +4."""
    names = sorted(counts, key=lambda name: (-counts[name], name))
    rest = sum(counts[name] for name in names[most:])
    parts = [f"{counts[name]} {name.replace('_', ' ')}" for name in names[:most]]
    return ", ".join(parts + ([f"+{rest}"] if rest else []))


def printable(text: str) -> str:
    """The text with control characters written out, but for line ends and tabs."""
    return "".join(char if char in "\n\t" or char.isprintable() else ascii(char)[1:-1] for char in text)
