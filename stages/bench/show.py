"""The figures of a benchmark as a table for people, and as JSON with the machine they were measured on."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.artifacts.manifest import versions
from stages.artifacts.run import explained, write_json
from stages.bench.score import Bars
from stages.config import RunConfig


def lines_of(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns (what, figure, bar) for each line of the table; the bar is empty where there is none."""
    cold, single, flood, stage = (figures[name] for name in ("cold", "single", "flood", "stage"))
    bars = Bars()
    lines = [
        ("cold container to its first verdict", f"{cold['median_ms']:.0f} ms", f"< {bars.cold_ms:.0f} ms"),
        ("   the slowest", f"{cold['slowest_ms']:.0f} ms", ""),
        ("a trivial case, alone: p50", f"{single['p50_ms']:.1f} ms", ""),
        ("   p99", f"{single['p99_ms']:.1f} ms", ""),
        ("trivial cases, all at once", f"{flood['cases_per_s']:.0f} a second", f">= {bars.cases_per_s:.0f}"),
        ("   in the sandbox: p50", f"{flood['p50_ms']:.1f} ms", ""),
        ("   p99", f"{flood['p99_ms']:.1f} ms", ""),
    ]
    if "overhead_ms" in flood:
        lines.append(("   CPU a case", f"{flood['overhead_ms']:.2f} ms", ""))
        lines += [(f"      {words}", f"{flood[f'{name}_ms']:.2f} ms", "") for name, words in PARTS.items()]
    lines += [
        (
            f"score stage, {stage['completions']} x {stage['games']} games",
            f"{stage['wall_s']:.1f} s, {stage['cpu_s']:.1f} s of CPU",
            "",
        ),
        ("   moves a second", f"{stage['moves_per_s']:.0f}", ""),
        ("   strategy", f"{stage['strategy_us_per_move']:.2f} us a move", ""),
        ("   rules", f"{stage['rules_us_per_move']:.2f} us a move", f"<= {bars.rules_us_per_move:.0f} us"),
        (
            "   CPU share of programs and rules",
            f"{stage['share_programs_and_rules']:.1%}",
            f">= {bars.programs_and_rules:.0%}",
        ),
        ("   of strategy() and Game.play() alone", f"{stage['share_calls_and_rules']:.1%}", ""),
    ]
    lines += [(f"      {words}", f"{stage['share'][name]:.1%}", "") for name, words in PARTS.items()]
    return lines


PARTS = {
    "program": "the programs' processes",
    "supervisor": "supervisors, rules included",
    "nursery_and_init": "nursery and init",
    "pool_and_stage": "pool and stage, this process",
    "daemon": "container daemon",
}


def print_table(figures: Mapping[str, Any], config: RunConfig) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    sandbox = config.sandbox
    table = Table(title=f"{sandbox.containers} sandboxes, backend {sandbox.backend}, {os.cpu_count()} cores")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("bar", justify="right")
    for line in lines_of(figures):
        table.add_row(*line)
    Console(highlight=False).print(table)


def write(path: Path, figures: Mapping[str, Any], config: RunConfig, *, command: str) -> None:
    """Writes the figures with the machine, the versions and the command that measures them again."""
    body = {
        "what": "judging: cold start, latency, cases a second, CPU accounts of the score stage",
        "command": command,
        "machine": machine(),
        "versions": versions("game2048"),
        "sandbox": config.to_dict()["sandbox"],
        "figures": rounded(figures),
    }
    with explained(path.parent, "choose another file with --out"):
        write_json(path, body)


def rounded(value: Any) -> Any:
    """Returns the same with four significant digits."""
    if isinstance(value, Mapping):
        return {name: rounded(each) for name, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def machine() -> dict[str, Any]:
    """Returns processor, cores, system and how busy it was: the load of the last minute includes this benchmark."""
    processor = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    except OSError:
        processor = platform.processor()
    return {
        "processor": processor or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 2),
    }
