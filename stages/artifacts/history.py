"""A run read back and summed up: what `inspect`, `runs` and the report show. A stage counts when its manifest is there.

Sums read whole columns and never a column of texts, so that a run of 100 000 completions is summed up in seconds. Every
page that is read is checked; a damaged file is the UserError of `read_table`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stages.artifacts.keys import STAGES
from stages.artifacts.manifest import NAME, TIMINGS
from stages.artifacts.parquet import METRICS, ROLLOUTS, SCORES, SUMMARY, part_paths, read_part, read_schema, read_table
from stages.artifacts.parquet import TIMINGS as TIMINGS_SCHEMA
from stages.artifacts.run import RunDir
from stages.artifacts.stage import StageId
from stages.config import UserError, pasteable

CHECKS = tuple(SCORES.names[SCORES.get_field_index("detail") + 1 :])  # stages/tasks/checks.py
FIGURES = ("group_index", "reward", "outcome", "num_tokens", "finish_reason", *CHECKS)
COUNTED = ("iteration", "step", "tokens", "zero_signal_groups")  # of the metrics: not to be averaged over steps


@dataclass(frozen=True)
class Iteration:
    """What one scored iteration gave.

    reward_low, reward_high, tokens_low, tokens_high: the quartiles over completions
    reward_error: standard error of the mean reward, with groups as units; 0 with one group
    spread: standard deviation of the rewards inside a group, averaged over groups
    silent_groups: groups whose rewards are all equal, which teach nothing
    truncated: share of completions that ran into max_new_tokens
    metrics: means over the iteration's optimizer steps; empty while the update has not finished
    parts: the mean of each reward function, by its name without reward_
    checks: for each of CHECKS how many of the programs that ended ok are {"yes": 3, "no": 40, "unknown": 5};
        state_kept is yes where it names something
    """

    index: int
    completions: int
    groups: int
    silent_groups: int
    reward: float
    reward_low: float
    reward_high: float
    reward_error: float
    spread: float
    outcomes: dict[str, int]
    tokens: float
    tokens_low: float
    tokens_high: float
    truncated: float
    metrics: dict[str, float]
    parts: dict[str, float] = field(default_factory=dict)
    checks: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class PlayedGame:
    """One game of a verdict; letters is empty where a task records no moves.

    Example: PlayedGame(seed=7, moves=40, max_tile=64, score=340, state="won", letters="AWSW...")
    """

    seed: int
    moves: int
    max_tile: int
    score: int
    state: str
    letters: str = ""


def finished(run: RunDir) -> list[StageId]:
    """Every stage of the run that has a manifest, in the order load, iterations, evaluations, exports."""
    folders = sorted(path.parent.relative_to(run.path) for path in _manifests(run.path))
    stages = [stage for folder in folders if (stage := _stage(folder))]
    order = [*STAGES]
    return sorted(
        stages, key=lambda stage: (stage.name in ("evaluate", "export"), stage.index or 0, order.index(stage.name))
    )


def scored(run: RunDir) -> list[int]:
    """The iterations whose scores are finished."""
    return sorted(stage.index or 0 for stage in finished(run) if stage.name == "score")


def summed_up(run: RunDir, iteration: int, *, table: Any = None) -> Iteration:
    """One scored iteration in figures; `table` is what `figures` gives of it, read here when not given."""
    table = figures(run, iteration) if table is None else table
    groups = table.group_by("group_index").aggregate(
        [("reward", "mean"), ("reward", "stddev"), ("reward", "min"), ("reward", "max")]
    )
    silent = pc.sum(pc.equal(groups["reward_min"], groups["reward_max"])).as_py()
    counts = table.group_by("outcome").aggregate([("outcome", "count")]).to_pylist()
    reward_low, reward_high = pc.quantile(table["reward"], q=[0.25, 0.75]).to_pylist()
    tokens_low, tokens_high = pc.quantile(table["num_tokens"], q=[0.25, 0.75]).to_pylist()
    error = pc.stddev(groups["reward_mean"], ddof=1).as_py() if len(groups) > 1 else 0.0
    return Iteration(
        index=iteration,
        completions=len(table),
        groups=len(groups),
        silent_groups=silent,
        reward=pc.mean(table["reward"]).as_py(),
        reward_low=reward_low,
        reward_high=reward_high,
        reward_error=error / len(groups) ** 0.5,
        spread=pc.mean(groups["reward_stddev"]).as_py(),
        outcomes={row["outcome"]: row["outcome_count"] for row in counts},
        tokens=pc.mean(table["num_tokens"]).as_py(),
        tokens_low=tokens_low,
        tokens_high=tokens_high,
        truncated=pc.mean(pc.equal(table["finish_reason"], "length").cast(pa.float64())).as_py(),
        metrics=_metrics(run, iteration),
        parts={
            name.removeprefix("reward_"): pc.mean(table[name]).as_py()
            for name in table.column_names
            if name.startswith("reward_")
        },
        checks=_checks(table),
    )


def figures(run: RunDir, iteration: int) -> Any:
    """The iteration's `completions` with FIGURES and a column for each reward function: no column of texts."""
    paths = part_paths(run.folder(StageId("score", iteration)), "scores")
    names = read_schema(paths[0]).names if paths else []
    return completions(run, iteration, [*FIGURES, *(name for name in names if name.startswith("reward_"))])


def completions(run: RunDir, iteration: int, columns: Sequence[str] | None = None) -> Any:
    """The iteration's rollouts joined with their scores: a pyarrow Table in completion_id order.

    columns: of either table; None takes all. Errors: UserError when the iteration has not been scored.
    """
    rollout, score = (run.folder(StageId(name, iteration)) for name in ("rollout", "score"))
    if not (score / NAME).is_file():
        done = scored(run)
        known = f"scored are 0 to {done[-1]}" if done else "no iteration has been scored yet"
        raise UserError(f"iteration {iteration} of {run.path} has no scores", known)
    ours = None if columns is None else [name for name in columns if name in ROLLOUTS.names and name != "completion_id"]
    theirs = None if columns is None else [name for name in columns if name not in ROLLOUTS.names]
    rollouts = read_table(rollout, "rollouts", ROLLOUTS, columns=ours if ours is None else ["completion_id", *ours])
    scores = read_table(score, "scores", SCORES, columns=theirs if theirs is None else ["completion_id", *theirs])
    places = pc.index_in(scores["completion_id"], value_set=rollouts["completion_id"].combine_chunks())
    if places.null_count or len(scores) != len(rollouts):
        raise UserError(
            f"the scores of iteration {iteration} are not of its rollouts",
            f"make them again: {pasteable('flexsink', 'resume', run.path)}",
        )
    if not places.equals(pa.chunked_array([range(len(places))], places.type)):
        rollouts = rollouts.take(places)
    for name in scores.column_names[1:]:
        rollouts = rollouts.append_column(scores.schema.field(name), scores[name])
    return rollouts


def texts(run: RunDir, chosen: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The whole rows, rollout and score, of the completions of training named in `chosen`, by their id."""
    wanted: dict[int, list[str]] = {}
    for completion_id in chosen:
        wanted.setdefault(int(completion_id.split("-")[0]), []).append(completion_id)
    rows: dict[str, dict[str, Any]] = {}
    for iteration, ids in wanted.items():
        for stage, name in (("rollout", "rollouts"), ("score", "scores")):
            for row in _rows(run.folder(StageId(stage, iteration)), name, ids):
                rows.setdefault(row["completion_id"], {}).update(row)
    return rows


def games(row: dict[str, Any]) -> list[PlayedGame]:
    """The games of a row of scores or of evaluations; none where the task plays none."""
    return [
        PlayedGame(
            **{name: game.get(name) for name in ("seed", "moves", "max_tile", "score", "state")},
            letters=game.get("letters") or "",
        )
        for game in row.get("games") or []
    ]


def rewards(row: dict[str, Any]) -> dict[str, float]:
    """The rewards of a scored row by reward function: {"works": 1.0, ...}."""
    return {name.removeprefix("reward_"): row[name] for name in row if name.startswith("reward_")}


def evaluated(run: RunDir) -> dict[int, list[dict[str, Any]]]:
    """The summaries of the finished evaluations: number of updates -> one row per policy or baseline."""
    stages = [stage for stage in finished(run) if stage.name == "evaluate"]
    return {stage.index or 0: read_table(run.folder(stage), "summary", SUMMARY).to_pylist() for stage in stages}


def timings(run: RunDir) -> Iterator[tuple[StageId, list[dict[str, Any]]]]:
    """Every finished stage with the rows of its timings; its own duration is the row whose `what` is "stage"."""
    for stage in finished(run):
        folder = run.folder(stage)
        if (folder / TIMINGS).is_file():
            yield stage, read_table(folder, "timings", TIMINGS_SCHEMA).to_pylist()


def _checks(table: Any) -> dict[str, dict[str, int]]:
    ended = table.filter(pc.equal(table["outcome"], "ok"))
    found = {}
    for name in CHECKS:
        answers = ended[name]
        if name == "state_kept":
            answers = pc.not_equal(answers, "")
        yes, unknown = pc.sum(answers).as_py() or 0, answers.null_count
        found[name] = {"yes": yes, "no": len(answers) - unknown - yes, "unknown": unknown}
    return found


def _metrics(run: RunDir, iteration: int) -> dict[str, float]:
    folder = run.folder(StageId("update", iteration))
    if not (folder / NAME).is_file():
        return {}
    table = read_table(folder, "metrics", METRICS)
    means = {name: pc.mean(table[name]).as_py() for name in table.column_names if name not in COUNTED}
    if run.config().update.kl == 0:
        means.pop("kl", None)  # without its weight the divergence is not measured, and the 0 in the file says nothing
    return {name: value for name, value in means.items() if value is not None}


def _rows(folder: Path, name: str, ids: Sequence[str]) -> Iterator[dict[str, Any]]:
    for path in part_paths(folder, name):
        held = read_part(path, ["completion_id"])["completion_id"]
        if pc.any(pc.is_in(held, value_set=pa.array(ids))).as_py():
            table = read_part(path)
            yield from table.filter(pc.is_in(table["completion_id"], value_set=pa.array(ids))).to_pylist()


def _manifests(path: Path) -> Iterator[Path]:
    for pattern in ("load", "iterations/*/*", "evaluations/*", "export/*"):
        yield from path.glob(f"{pattern}/{NAME}")


def _stage(folder: Path) -> StageId | None:
    """The stage whose folder this is; None for what is set aside or unfinished."""
    match folder.parts:
        case ("load",):
            return StageId("load")
        case ("iterations", index, name) if index.isdecimal() and name in ("rollout", "score", "update"):
            return StageId(name, int(index))
        case ("evaluations", index) if index.isdecimal():
            return StageId("evaluate", int(index))
        case ("export", label) if not label.startswith("."):
            return StageId("export", None, label)
    return None
