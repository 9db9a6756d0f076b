"""The tables of a run: their schemas, with units, and writing and reading them so that damage is seen.

Files are zstd with a CRC of every page, and every read checks it. A table is written as parts of at most 128 rows,
`rollouts-00000.parquet`, or as one file, `summary.parquet`; both are read by the table's name. Parts whose schemas
differ (an older run, a column that came later) are unified column by column: a column that a part lacks is null there.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.config import UserError

SCHEMA_VERSION = 1
ROWS_PER_PART = 128


def column(name: str, kind: pa.DataType, unit: str = "", *, null: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=null, metadata={"unit": unit} if unit else None)


def table_schema(table: str, columns: Sequence[pa.Field]) -> pa.Schema:
    return pa.schema(columns, metadata={"flexsink.table": table, "flexsink.schema_version": str(SCHEMA_VERSION)})


ROLLOUTS = table_schema(
    "rollouts",
    [
        column("completion_id", pa.string()),
        column("prompt_id", pa.string()),
        column("group_index", pa.int32()),
        column("sample_index", pa.int32()),
        column("iteration", pa.int32()),
        column("policy_version", pa.int32(), "updates"),
        column("task", pa.string()),
        column("prompt", pa.string()),
        column("completion", pa.string()),
        column("prompt_ids", pa.list_(pa.int32())),
        column("completion_ids", pa.list_(pa.int32())),
        column("engine_logprobs", pa.list_(pa.float32()), "nat, under the sampling policy"),
        column("finish_reason", pa.string()),
        column("seed", pa.int64()),
        column("num_tokens", pa.int32(), "tokens of the completion"),
        # null without update.replay_routes. C order; a token's choices in any order. The last token is not computed.
        column("routes", pa.binary(), "expert chosen, uint8 [prompt + completion - 1, layers, k]", null=True),
    ],
)

# SCORES, EVALUATIONS and SUMMARY are what every task has; the functions below add the columns that a task brings.
# `reward` is the sum of the reward_<function> columns.
SCORES = table_schema(
    "scores",
    [
        column("completion_id", pa.string()),
        column("outcome", pa.string()),
        column("reward", pa.float64()),
        column("program", pa.string(), null=True),
        column("detail", pa.string(), null=True),
        # stages/tasks/checks.py; null is unknown
        column("depends_on_board", pa.bool_(), null=True),
        column("depends_on_calls", pa.bool_(), null=True),
        column("depends_on_random", pa.bool_(), null=True),
        column("depends_on_time", pa.bool_(), null=True),
        column("state_kept", pa.string(), null=True),
    ],
)

SAMPLES = table_schema(
    "samples",
    [
        column("completion_id", pa.string()),
        column("advantage", pa.float64()),
        column("loss_mask", pa.list_(pa.bool_())),
        column("policy_logprobs", pa.list_(pa.float32()), "nat, before the iteration's first step"),
        column("reference_logprobs", pa.list_(pa.float32()), "nat, without the adapter", null=True),
        column("importance_weights", pa.list_(pa.float32()), "policy over engine probability, as corrected", null=True),
    ],
)

METRICS = table_schema(
    "metrics",
    [
        column("iteration", pa.int32()),
        column("step", pa.int32(), "optimizer steps before this one"),
        column("learning_rate", pa.float64(), null=True),
        column("loss", pa.float64(), null=True),
        column("kl", pa.float64(), "nat, policy to reference, per token", null=True),
        column("clip_fraction", pa.float64(), "share of tokens", null=True),
        column("correction_fraction", pa.float64(), "share of tokens truncated or masked", null=True),
        column("ratio_mean", pa.float64(), "policy over old policy, before clipping", null=True),
        column("ratio_std", pa.float64(), null=True),
        column("ratio_min", pa.float64(), null=True),
        column("ratio_max", pa.float64(), null=True),
        column("engine_difference_mean", pa.float64(), "nat, engine against trainer logprobs", null=True),
        column("engine_difference_max", pa.float64(), "nat", null=True),
        column("engine_kl", pa.float64(), "nat, k3 estimate, per token", null=True),
        column("engine_ratio_mean", pa.float64(), "policy over engine probability, before any correction", null=True),
        column("engine_ratio_min", pa.float64(), null=True),
        column("engine_ratio_max", pa.float64(), null=True),
        column(
            "routes_differ", pa.float64(), "share of (token, layer) that the trainer would route otherwise", null=True
        ),
        column("entropy", pa.float64(), "nat, per token", null=True),
        column("grad_norm", pa.float64(), "L2, before clipping", null=True),
        column("zero_signal_groups", pa.int32(), "groups whose rewards are all equal", null=True),
        column("tokens", pa.int64(), "completion tokens with a gradient", null=True),
    ],
)

EVALUATIONS = table_schema(
    "evaluations",
    [
        column("kind", pa.string()),
        column("name", pa.string()),
        column("completion_id", pa.string(), null=True),
        column("completion", pa.string(), null=True),
        column("program", pa.string(), null=True),
        column("outcome", pa.string()),
        column("syntax_tree", pa.string(), "sha256 of the tree without positions", null=True),
    ],
)

SUMMARY = table_schema(
    "summary",
    [
        column("kind", pa.string()),
        column("name", pa.string()),
        column("programs", pa.int32()),
        column("distinct_programs", pa.int32()),
    ],
)

TIMINGS = table_schema(
    "timings",
    [
        column("what", pa.string()),
        column("seconds", pa.float64(), "s", null=True),
        column("num_tokens", pa.int64(), null=True),
        column("tokens_per_s", pa.float64(), null=True),
        column("peak_bytes", pa.int64(), null=True),
    ],
)


def scores_schema(
    reward_names: Sequence[str], *, cases: str = "", case_columns: Mapping[str, str] | None = None
) -> pa.Schema:
    """SCORES with one column per reward function, after `reward`, and the column `cases`, before `detail`.

    case_columns: the fields of a case and their Arrow types, by name.
    Example: scores_schema(["works", "strategy"], cases="games", case_columns={"seed": "int64", "state": "string"})
    """
    names = [name if name.startswith("reward_") else f"reward_{name}" for name in reward_names]
    place, end = SCORES.get_field_index("reward") + 1, SCORES.get_field_index("detail")
    fields = list(SCORES)
    rewards = [column(name, pa.float64()) for name in names]
    judged = [cases_column(cases, case_columns or {})] if cases else []
    return table_schema("scores", [*fields[:place], *rewards, *fields[place:end], *judged, *fields[end:]])


def evaluations_schema(figures: Sequence[tuple[str, str]], *, cases: str, case_columns: Mapping[str, str]) -> pa.Schema:
    """EVALUATIONS with a column for each figure, given as (name, unit), and the cases a program was judged on."""
    added = [column(name, pa.float64(), unit) for name, unit in figures]
    return table_schema("evaluations", [*EVALUATIONS, *added, cases_column(cases, case_columns)])


def summary_schema(
    figures: Sequence[tuple[str, str]], *, cases: str, tally: tuple[str, str] | None = None
) -> pa.Schema:
    """SUMMARY with the number of cases, each figure with its interval, and the histogram (column, what is counted).

    Example: summary_schema([("win_rate", "share of games")], cases="games", tally=("tiles", "tile"))
    """
    added = [column(cases, pa.int32())]
    for name, unit in figures:
        ends = [column(f"{name}_{end}", pa.float64(), "95 % bootstrap over programs") for end in ("low", "high")]
        added += [column(name, pa.float64(), unit), *ends]
    if tally is not None:
        entry = pa.struct([pa.field(tally[1], pa.int32()), pa.field(cases, pa.int32())])
        added.append(column(tally[0], pa.list_(entry), null=True))
    return table_schema("summary", [*SUMMARY, *added])


def cases_column(name: str, columns: Mapping[str, str]) -> pa.Field:
    """A nullable column of lists of cases."""
    fields = [pa.field(each, pa.type_for_alias(kind)) for each, kind in columns.items()]
    return column(name, pa.list_(pa.struct(fields)), null=True)


def write_parts(
    folder: Path, name: str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema, *, rows_per_part: int = ROWS_PER_PART
) -> list[Path]:
    """Writes `rows`, in their order, as name-00000.parquet ...; no rows give one empty part: the table exists."""
    paths = []
    for part, start in enumerate(range(0, max(len(rows), 1), rows_per_part)):
        path = folder / f"{name}-{part:05d}.parquet"
        write_table(path, rows[start : start + rows_per_part], schema)
        paths.append(path)
    return paths


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Writes one file. Rows may leave nullable columns out; a column the schema does not have is an error."""
    known = set(schema.names)
    for row in rows:
        assert known.issuperset(row), f"{path.name}: columns {sorted(set(row) - known)} are not in its schema"
        missing = [field.name for field in schema if not field.nullable and row.get(field.name) is None]
        assert not missing, f"{path.name}: columns {missing} must not be null"
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    # Written through a Python file so that a full disk keeps its errno.
    with open(path, "wb") as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        file.flush()
        os.fsync(file.fileno())


def part_paths(folder: Path, name: str) -> list[Path]:
    """The files of a table in order."""
    whole = folder / f"{name}.parquet"
    return [whole] if whole.is_file() else sorted(folder.glob(f"{name}-[0-9]*.parquet"))


def read_table(
    folder: Path, name: str, schema: pa.Schema | None = None, *, columns: Sequence[str] | None = None
) -> pa.Table:
    """The whole table, every page's checksum verified; parts unified, the columns of `schema` first and in its types.

    columns: only these, which must be in a part or in `schema`.
    Errors: UserError when there is no such table or a file of it is damaged.
    """
    paths = part_paths(folder, name)
    if not paths:
        raise UserError(f"{folder} has no table {name}", "see what the run holds with: flexsink inspect RUN")
    schemas = [] if schema is None else [schema]
    schemas += [read_schema(path) for path in paths]
    try:
        unified = pa.unify_schemas([each.remove_metadata() for each in schemas], promote_options="permissive")
    except pa.ArrowException as error:
        message = f"the parts of {folder / name} do not fit together: {error}"
        raise UserError(message, "they were written by different versions: start a new run") from error
    unified = unified.with_metadata((schema or schemas[0]).metadata)
    if columns is not None:
        absent = [each for each in columns if each not in unified.names]
        if absent:
            raise UserError(f"{folder / name} has no column {absent[0]}", f"it has {', '.join(unified.names)}")
        unified = pa.schema([unified.field(each) for each in columns], metadata=unified.metadata)
    return pa.concat_tables([fitted(read_part(path, columns), unified) for path in paths]).replace_schema_metadata(
        unified.metadata
    )


def read_schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise damaged(path, error) from error


def read_part(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            present = None if columns is None else [each for each in columns if each in file.schema_arrow.names]
            return file.read(columns=present)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{path} is damaged: {reason}", "flexsink resume RUN makes the stage again that wrote it")


def fitted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with exactly the columns of `schema`: cast, and null where the table has none."""
    names, rows = table.column_names, len(table)
    columns = [
        table.column(field.name).cast(field.type) if field.name in names else pa.nulls(rows, field.type)
        for field in schema
    ]
    nullable = pa.schema([field.with_nullable(True) for field in schema])
    return pa.Table.from_arrays(columns, schema=nullable)
