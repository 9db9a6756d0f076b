"""The journal: nothing that was appended is lost, nothing torn is believed."""

import threading
from pathlib import Path

import pytest

from stages.artifacts import Journal

RECORDS = [
    {"completion_id": f"00000-000-{number:03d}", "ids": [number, 2, 3], "logprob": -0.1 * number} for number in range(6)
]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "work.journal")
    for record in RECORDS:
        journal.append(record)
    return journal


def test_records_come_back_in_order_and_floats_exactly(journal: Journal) -> None:
    assert Journal(journal.path).records() == RECORDS


def test_a_journal_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert Journal(tmp_path / "none.journal").records() == []


def test_a_torn_tail_of_any_length_costs_only_the_torn_record(journal: Journal) -> None:
    whole = journal.path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(0, len(whole), 3):
        journal.path.write_bytes(whole[:length])
        expected = sum(end <= length for end in ends)
        assert journal.records() == RECORDS[:expected]
        assert journal.path.stat().st_size == ([0, *ends])[expected]
    journal.append(RECORDS[5])
    assert journal.records() == RECORDS


def test_any_flipped_bit_ends_the_journal_there(journal: Journal) -> None:
    whole = journal.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    position = 0
    for index, line in enumerate(lines):
        for place in range(0, len(line), 13):
            for bit in range(8):
                body = bytearray(whole)
                body[position + place] ^= 1 << bit
                journal.path.write_bytes(body)
                assert journal.records() == RECORDS[:index]
        position += len(line)


def test_appending_goes_on_after_a_cut(journal: Journal) -> None:
    with open(journal.path, "ab") as file:
        file.write(b'0123456789abcdef {"torn"')
    again = Journal(journal.path)
    assert again.records() == RECORDS
    again.append({"completion_id": "next"})
    assert again.records() == [*RECORDS, {"completion_id": "next"}]


def test_threads_may_append_at_the_same_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "work.journal")
    threads = [
        threading.Thread(target=lambda: [journal.append({"text": "x" * 5000}) for _ in range(10)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(journal.records()) == 40


def test_what_is_not_json_is_refused_and_leaves_the_journal_as_it_was(journal: Journal) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.append({"logprob": float("nan")})
    assert journal.records() == RECORDS
