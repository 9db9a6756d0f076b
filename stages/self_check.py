"""The self-check of a sandbox backend: attacks it with the whole corpus, in the little game and in the real tasks, and
prints what came of each attack.

A backend passes when every attack had one of its expected outcomes, gained nothing, proved that it ran, and the honest
program after it was judged right.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import get_args, get_type_hints

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from stages.config import SandboxConfig, UserError
from stages.sandbox import open_pool
from stages.sandbox.corpus import Attack, load
from stages.sandbox.self_check import LIMITS, Arena, Finding, Pick, attack_pool
from stages.tasks.arenas import task_arenas

STAGE = "self-check"


def backends() -> tuple[str, ...]:
    """Returns the backends that there are."""
    return get_args(get_type_hints(SandboxConfig)["backend"])


def arenas() -> dict[str, Arena]:
    """Returns every game that attacks name."""
    return {"pick": Pick(), **task_arenas()}


def chosen(words: Sequence[str]) -> tuple[Attack, ...]:
    """Returns the attacks whose name, kind or task holds one of the words, all without any; UserError for none."""
    attacks = tuple(
        attack
        for attack in load()
        if not words or any(word in text for word in words for text in (attack.name, attack.kind, attack.task))
    )
    if not attacks:
        raise UserError(f"no attack is called {' or '.join(words)}", "look into stages/sandbox/attacks")
    return attacks


def findings(attacks: Sequence[Attack], *, backend: str, runtime: str, console: Console) -> list[Finding]:
    """Returns what came of the attacks on a pool of one sandbox; UserError where the backend is not to be had."""
    if backend not in backends():
        raise UserError(f"no sandbox backend {backend}", f"there is {', '.join(backends())}")
    config = SandboxConfig(backend=backend, containers=1, memory_bytes=LIMITS.memory_bytes, runtime=runtime)  # type: ignore[arg-type]
    games = arenas()
    harnesses = {name: arena.harness for name, arena in games.items()}
    found = []
    with (
        open_pool(config, harnesses=harnesses, labels={"flexsink.stage": STAGE}) as pool,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        bar = progress.add_task("attacking", total=sum(len(attack.expected) for attack in attacks))
        for finding in attack_pool(pool, attacks, arenas=games, backend=backend):
            found.append(finding)
            progress.update(bar, advance=1, description=finding.attack.name)
    return found


def shown(found: Sequence[Finding]) -> Table:
    """Returns the table. Words of a program are shown as text, whatever they hold."""
    table = Table("attack", "way in", "claimed effect", "outcome", "verdict", pad_edge=False)
    for finding in found:
        verdict = "skipped" if finding.skipped else finding.failure or "ok"
        style = "yellow" if finding.skipped else "red" if finding.failure else "green"
        table.add_row(
            finding.attack.name,
            finding.mode,
            Text(finding.attack.claims),
            Text(finding.outcome),
            Text(verdict, style=style),
        )
    return table


def summary(found: Sequence[Finding], *, backend: str, seconds: float) -> str:
    """Returns the last line: what was attacked, what came of it, how long it took."""
    counts = Counter("skipped" if finding.skipped else "ok" if finding.passed else "failed" for finding in found)
    words = f"{len({finding.attack.name for finding in found})} attacks, {len(found)} runs on {backend}: "
    words += f"{counts['ok']} came to nothing, {counts['failed']} failed"
    if counts["skipped"]:
        words += f", {counts['skipped']} skipped"
    return f"{words}; {seconds:.1f} s"


def self_check(*, backend: str, runtime: str = "", words: Sequence[str] = ()) -> int:
    """Attacks, prints the table and the summary; returns 1 when anything failed, else 0."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    started = time.monotonic()
    found = findings(chosen(words), backend=backend, runtime=runtime, console=console)
    console.print(shown(found))
    console.print(Text(summary(found, backend=backend, seconds=time.monotonic() - started)))
    return int(any(not finding.passed for finding in found))
