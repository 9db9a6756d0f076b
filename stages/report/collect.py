"""A run's files to the Contents of its report. Reads figures of every completion, but texts of the few it shows."""

import heapq
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.artifacts import history
from stages.artifacts.history import PlayedGame
from stages.artifacts.parquet import EVALUATIONS, read_table
from stages.artifacts.run import RunDir
from stages.artifacts.stage import StageId
from stages.report.achieved import BINS, achieved, speeds
from stages.report.contents import Contents, Cost, Export, Game, Player, Program, Share, Words
from stages.report.figures import number
from stages.report.replay import ReplayError, replay
from stages.tasks import registry
from stages.tasks.base import Figure, Task
from stages.tasks.game2048.task import Game2048
from stages.tasks.matmul.task import Matmul

SHOWN = 3  # programs in each column of the gallery
CASES = 8  # rows of a program's table of cases
SPEED_WORDS: dict[str, Any] = {
    "tally": "Speed-up of a program",
    "tally_note": "Times the speed of three loops; share of programs. Wrong is any that is not right on every product.",
    "tallied": "programs",
    "bins": BINS,
}
LOOKED_AT = 24  # completions with the highest rewards whose texts are read to find SHOWN different programs


def collect(path: Path) -> Contents:
    """Everything the page shows; a run that is still going gives what it has. UserError when `path` holds no run."""
    run = RunDir.open(path)
    config = run.config()
    task = registry.of(config)
    tables = {i: history.figures(run, i) for i in history.scored(run)}
    summaries = history.evaluated(run)
    tallies = {updates: _speeds(run, updates, task) for updates in summaries} if isinstance(task, Matmul) else {}
    best, worst = _programs(run, list(tables.values()), task)
    return Contents(
        name=path.resolve().name,
        task=task.title,
        words=Words(
            cases=task.cases,
            player=task.player,
            meet=task.meet,
            met=task.met,
            score=task.figures[0].title,
            shares=[(each.title, each.short or each.title) for each in _shares(task)],
            **(SPEED_WORDS if isinstance(task, Matmul) else {}),
        ),
        model=config.model.source,
        preset=f"preset {config.preset}",
        planned_iterations=config.train.iterations,
        iterations=[history.summed_up(run, i, table=table) for i, table in tables.items()],
        policies=[
            _player(row, updates, task, tallies.get(updates, {}))
            for updates, rows in summaries.items()
            for row in _of(rows, "policy")
        ],
        baselines=[
            _player(row, None, task, tallies.get(max(summaries), {}))
            for row in _of(summaries[max(summaries)], "baseline")
        ]
        if summaries
        else [],
        best=best,
        worst=worst,
        achieved=achieved(run, tables, task),
        games=_games(run, task, sorted(summaries)) if isinstance(task, Game2048) else [],
        costs=_costs(run),
        exports=_exports(run),
        config=config.to_dict(),
        environment=run.environment(),
    )


def _shares(task: Task) -> list[Figure]:
    return [figure for figure in task.figures[1:] if figure.share]


def _of(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == kind]


def _speeds(run: RunDir, updates: int, task: Matmul) -> dict[tuple[str, str], dict[int | str, int]]:
    """The speed-ups of an evaluation's programs, counted for each player by kind and name."""
    columns = ["kind", "name", task.cases]
    players: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in read_table(run.folder(StageId("evaluate", updates)), "evaluations", columns=columns).to_pylist():
        players.setdefault((row["kind"], row["name"]), []).append(row)
    return {player: speeds(rows, task) for player, rows in players.items()}


def _player(
    row: dict[str, Any], updates: int | None, task: Task, counted: Mapping[tuple[str, str], Mapping[int | str, int]]
) -> Player:
    label = row["name"].replace("_", " ") if updates is None else f"after {updates} updates" if updates else "untrained"
    first, tally = task.figures[0].name, task.tally
    return Player(
        label=label,
        updates=updates,
        programs=row["programs"],
        distinct_programs=row["distinct_programs"],
        cases=row[task.cases],
        score=row[first],
        score_low=row[f"{first}_low"],
        score_high=row[f"{first}_high"],
        shares=[Share(*(row[each.name + end] for end in ("", "_low", "_high"))) for each in _shares(task)],
        tiles={entry[tally.value]: entry[task.cases] for entry in row[tally.name] or []}
        if tally
        else dict(counted.get((row["kind"], row["name"]), {})),
    )


def _programs(run: RunDir, tables: list[Any], task: Task) -> tuple[list[Program], list[Program]]:
    """The best different programs of the run, and the worst completion of each outcome, lowest reward first."""
    high: list[tuple[float, str]] = []
    low: dict[str, tuple[float, str]] = {}
    for table in tables:
        columns = (table[name].to_pylist() for name in ("completion_id", "reward", "outcome"))
        for completion_id, reward, outcome in zip(*columns, strict=True):
            entry = (reward, completion_id)
            heapq.heappush(high, entry) if len(high) < LOOKED_AT else heapq.heappushpop(high, entry)
            low[outcome] = min(low.get(outcome, entry), entry)
    rows = history.texts(run, {name for _, name in [*high, *low.values()]})
    best: dict[str | None, Program] = {}
    for _, name in sorted(high, reverse=True):
        best.setdefault(rows[name]["program"], _program(rows[name], task))
    shown = list(best.values())[:SHOWN]
    known = {program.completion_id for program in shown}
    return shown, [_program(rows[name], task) for _, name in sorted(low.values()) if name not in known][:SHOWN]


def _program(row: dict[str, Any], task: Task) -> Program:
    cases = row.get(task.cases)
    return Program(
        completion_id=row["completion_id"],
        reward=row["reward"],
        rewards=history.rewards(row),
        outcome=row["outcome"],
        detail=row["detail"] or "",
        source=row["program"],
        results=task.describe(cases) if cases else "",
        checks={name: row.get(name) for name in history.CHECKS if name != "state_kept"},
        state_kept=row.get("state_kept") or "",
        cases=_table(cases, task) if cases and not task.recording else [],
    )


def _table(cases: list[dict[str, Any]], task: Task) -> list[list[str]]:
    """Heads and rows of a table of cases; of many cases the first."""
    names = [name for name in task.case_columns if name != "seed" and any(case.get(name) is not None for case in cases)]
    rows = [[cell(case[name]) for name in names] for case in cases[:CASES]]
    return [[name.replace("_", " ") for name in names], *rows]


def cell(value: Any) -> str:
    """A case's value as people read it."""
    if isinstance(value, float):
        return number(value)
    return "" if value is None else str(value).replace("_", " ")


def _games(run: RunDir, task: Game2048, evaluations: list[int]) -> list[Game]:
    """The games to replay: the best and the median of the trained model, the best of the untrained."""
    shown = []
    for updates in dict.fromkeys(reversed([*evaluations[:1], *evaluations[-1:]])):
        table = read_table(run.folder(StageId("evaluate", updates)), "evaluations", EVALUATIONS)
        played = [
            (game, row)
            for row in _of(table.select(["kind", "completion_id", "program", "games"]).to_pylist(), "policy")
            for game in history.games(row)
            if game.letters
        ]
        played.sort(key=lambda entry: (entry[0].score, entry[0].seed))
        who = f"After {updates} updates" if updates else "Untrained"
        if played:
            shown.append((f"{who}: its best held-out game", *played[-1]))
        if played and updates:
            shown.append((f"{who}: a median held-out game", *played[len(played) // 2]))
    return [game for title, record, row in shown if (game := _game(title, record, row, task))]


def _game(title: str, record: PlayedGame, row: dict[str, Any], task: Game2048) -> Game | None:
    try:
        recorded = replay(record, size=task.options.size, target=task.options.target)
    except ReplayError:
        return None  # played under rules that have changed since: the page leaves it out rather than show another game
    return Game(title=title, completion_id=row["completion_id"] or "", replay=recorded, program=row["program"] or "")


def _exports(run: RunDir) -> list[Export]:
    shown = []
    for stage in history.finished(run):
        facts = run.folder(stage) / "export.json"
        manifest = run.manifest(stage)
        if stage.name != "export" or manifest is None or not facts.is_file():
            continue
        body = json.loads(facts.read_text(encoding="utf-8"))
        names = ("kl_to_live", "score_exported", "gain_kept", "gain_kept_with_residual")
        weights = sum(entry["bytes"] for name, entry in manifest.files.items() if name.endswith(".safetensors"))
        shown.append(Export(stage.label, weights, *(body.get(name) for name in names)))
    return shown


def _costs(run: RunDir) -> list[Cost]:
    """Durations summed over iterations, stage by stage in the order of a run."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for stage, timed in history.timings(run):
        rows.setdefault(stage.name, []).extend(timed)
    return [_cost(stage, timed) for stage, timed in rows.items()]


def _cost(stage: str, timed: list[dict[str, Any]]) -> Cost:
    seconds: dict[str, float] = {}
    tokens: dict[str, float] = {}
    for row in timed:
        what, took = row["what"], row["seconds"] or 0.0
        seconds[what] = seconds.get(what, 0.0) + took
        tokens[what] = tokens.get(what, 0.0) + (row["num_tokens"] or (row["tokens_per_s"] or 0.0) * took)
    speeds = [tokens[what] / seconds[what] for what in seconds if seconds[what] > 0]
    return Cost(
        stage=stage,
        seconds=seconds.pop("stage", 0.0),
        parts=seconds,
        peak_bytes=max((row["peak_bytes"] or 0 for row in timed), default=0),
        tokens_per_s=max(speeds, default=0.0),
    )
