"""The tables: what is written comes back, damage is seen, parts of different schemas are unified and not cut down."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.artifacts import Manifest
from stages.artifacts.parquet import METRICS, ROLLOUTS, SCORES, read_table, scores_schema, write_parts, write_table
from stages.config import UserError


def rollout(number: int) -> dict[str, object]:
    return {
        "completion_id": f"00000-000-{number:03d}",
        "prompt_id": "p",
        "group_index": 0,
        "sample_index": number,
        "iteration": 0,
        "policy_version": 0,
        "task": "game2048",
        "prompt": "Write a program.",
        "completion": f"def strategy(board): return 'W'  # {number}",
        "prompt_ids": [1, 2, 3],
        "completion_ids": list(range(number)),
        "engine_logprobs": [-0.5] * number,
        "finish_reason": "stop",
        "seed": 2**63 - 1 - number,
        "num_tokens": number,
        "routes": bytes((number + place) % 32 for place in range(number)),
    }


def test_rows_come_back_in_order_across_parts(tmp_path: Path) -> None:
    rows = [rollout(number) for number in range(300)]
    paths = write_parts(tmp_path, "rollouts", rows, ROLLOUTS)
    assert [path.name for path in paths] == [f"rollouts-{part:05d}.parquet" for part in range(3)]
    assert max(pq.read_metadata(path).num_rows for path in paths) == 128
    assert read_table(tmp_path, "rollouts", ROLLOUTS).to_pylist() == rows
    assert read_table(tmp_path, "rollouts", columns=["seed"]).to_pylist() == [{"seed": row["seed"]} for row in rows]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [rollout(number) for number in range(20)]
    first, second = (write_parts(tmp_path, name, rows, ROLLOUTS)[0].read_bytes() for name in ("a", "b"))
    assert first == second


def test_units_and_schema_version_are_in_the_files(tmp_path: Path) -> None:
    (path,) = write_parts(tmp_path, "rollouts", [rollout(1)], ROLLOUTS)
    schema = pq.read_schema(path)
    assert schema.metadata[b"flexsink.schema_version"] == b"1"
    assert schema.field("engine_logprobs").metadata[b"unit"].startswith(b"nat")
    assert read_table(tmp_path, "rollouts").schema.metadata[b"flexsink.table"] == b"rollouts"


def test_no_rows_still_make_a_table(tmp_path: Path) -> None:
    write_parts(tmp_path, "rollouts", [], ROLLOUTS)
    assert read_table(tmp_path, "rollouts", ROLLOUTS).num_rows == 0


def test_unknown_and_missing_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="surprise"):
        write_parts(tmp_path, "rollouts", [rollout(1) | {"surprise": 1}], ROLLOUTS)
    row = rollout(1)
    del row["seed"]
    with pytest.raises(AssertionError, match="seed"):
        write_parts(tmp_path, "rollouts", [row], ROLLOUTS)
    write_parts(tmp_path, "metrics", [{"iteration": 0, "step": 0}], METRICS)
    assert read_table(tmp_path, "metrics", METRICS).to_pylist()[0]["loss"] is None


def test_flipped_bits_are_seen_by_the_page_checksums_and_the_rest_by_the_manifest(tmp_path: Path) -> None:
    rows = [rollout(number) for number in range(40)]
    (path,) = write_parts(tmp_path, "rollouts", rows, ROLLOUTS)
    manifest = Manifest.of(tmp_path, key="", inputs={}, recorded={})
    whole = path.read_bytes()
    seen = wrong = 0
    positions = range(0, len(whole), len(whole) // 500 | 1)  # odd: every bit of a byte has its turn
    for position in positions:
        body = bytearray(whole)
        body[position] ^= 1 << (position % 8)
        path.write_bytes(body)
        assert manifest.damage(tmp_path) == "rollouts-00000.parquet is corrupt: its sha256 differs"
        try:
            wrong += read_table(tmp_path, "rollouts", ROLLOUTS).to_pylist() != rows
        except UserError as error:
            seen += error.message.startswith(str(path)) and "is damaged" in error.message
    # A page's header and the footer have no checksum of their own, and most of the footer's bits change no value.
    assert wrong <= 0.03 * len(positions)
    assert seen > 0.4 * len(positions)


def test_a_table_that_is_not_there_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no table scores"):
        read_table(tmp_path, "scores")


def test_parts_of_an_older_schema_get_nulls_and_no_column_is_dropped(tmp_path: Path) -> None:
    old = pa.table({"completion_id": ["a"], "count": pa.array([1], pa.int32())})
    new = pa.table({"completion_id": ["b"], "count": pa.array([2], pa.int64()), "late": ["x"]})
    pq.write_table(old, tmp_path / "things-00000.parquet")
    pq.write_table(new, tmp_path / "things-00001.parquet")
    table = read_table(tmp_path, "things")
    assert table.to_pylist() == [
        {"completion_id": "a", "count": 1, "late": None},
        {"completion_id": "b", "count": 2, "late": "x"},
    ]
    assert table.schema.field("count").type == pa.int64()


def test_parts_that_contradict_each_other_are_a_user_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": ["a"]}), tmp_path / "things-00000.parquet")
    pq.write_table(pa.table({"x": [[1]]}), tmp_path / "things-00001.parquet")
    with pytest.raises(UserError, match="do not fit together"):
        read_table(tmp_path, "things")


def test_every_reward_function_gets_a_column_beside_the_sum(tmp_path: Path) -> None:
    columns = {"seed": "int64", "moves": "int32", "max_tile": "int32", "score": "int64", "state": "string"}
    schema = scores_schema(["works", "strategy"], cases="games", case_columns={**columns, "letters": "string"})
    games = [{"seed": 4, "moves": 210, "max_tile": 256, "score": 3012, "state": "stuck", "letters": "WASD"}]
    row = {"completion_id": "a", "outcome": "ok", "reward": 2.5, "reward_works": 1.0, "reward_strategy": 1.5}
    write_parts(tmp_path, "scores", [row | {"games": games, "program": None}], schema)
    table = read_table(tmp_path, "scores", SCORES)
    assert {"reward", "reward_works", "reward_strategy"} < set(table.column_names)
    assert table.to_pylist()[0]["games"] == games


def test_a_column_nobody_has_is_a_user_error(tmp_path: Path) -> None:
    write_table(tmp_path / "summary.parquet", [{"iteration": 0, "step": 1}], METRICS)
    with pytest.raises(UserError, match="has no column colour"):
        read_table(tmp_path, "summary", columns=["colour"])
