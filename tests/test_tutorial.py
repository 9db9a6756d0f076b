"""Every cell of data/tutorial.md, and every query in the README, run as it stands; what it prints is as written."""

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flows.cli import dispatch
from stages.artifacts import RunDir, history
from tests import synthetic_run

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Cell(NamedTuple):
    """A fenced block, and the text block that follows it."""

    kind: str
    source: str
    printed: str


def cells_of(text: str) -> list[Cell]:
    """The blocks that run, in order, each with what it is said to print; "" where nothing is said."""
    found: list[Cell] = []
    for kind, body in BLOCK.findall(text):
        if kind == "text":
            found[-1] = found[-1]._replace(printed=body)
        else:
            found.append(Cell(kind, body, ""))
    return found


def shape(text: str) -> list[str]:
    """The words of each line: numbers and spaces out, as they differ from machine to machine."""
    return [" ".join(re.sub(r"[-+]?\d[\d\u202f]*(\.\d+)?(e[-+]\d+)?", "#", line).split()) for line in text.splitlines()]


def agree(said: str, printed: str) -> bool:
    """Whether the text printed has the lines that were said, in their order; "..." stands for anything."""
    wanted, found = shape(said), shape(printed)
    for line in wanted:
        pattern = ".*".join(re.escape(part.strip()) for part in line.split("..."))
        place = next((i for i, each in enumerate(found) if re.fullmatch(pattern, each)), None)
        if place is None and line != "...":
            return False
        found = found[(place or 0) + (place is not None) :]
    return True


def test_what_a_cell_is_said_to_print_is_compared_without_its_numbers() -> None:
    assert agree("step 0: loss 0.1\nstep 1: loss ...\n", "step 0: loss -0.25\nstep 1: loss +1e-5, entropy 1\n")
    assert not agree("step 0: loss 0.1\n", "step 0: gain 0.1\n")
    assert not agree("a\nb\n", "b\na\n")
    assert agree("a\n...\nc\n", "a\nb\nc\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place to run in, where data/tiny is found."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tiny").symlink_to(ROOT / "data" / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(line: str) -> None:
    """What the command line does, in this process: it has imported everything already."""
    words = shlex.split(line)
    assert words[0] == "flexsink"
    assert dispatch(words[1:]) == 0, line


@pytest.mark.docker
def test_every_cell_of_the_tutorial_runs_and_prints_what_is_written_below_it(folder: Path) -> None:
    cells = cells_of((ROOT / "data" / "tutorial.md").read_text(encoding="utf-8"))
    assert len(cells) > 12
    scope: dict[str, Any] = {"__name__": "tutorial"}
    for number, cell in enumerate(cells):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if cell.kind == "python":
                exec(compile(cell.source, f"cell {number}", "exec"), scope)
            else:
                assert cell.kind == "sh"
                for line in cell.source.splitlines():
                    run_command(line)
        assert agree(cell.printed, printed.getvalue()), (
            f"cell {number} says\n{cell.printed}and prints\n{printed.getvalue()}"
        )
    assert (folder / "data" / "runs" / "tutorial" / "report.html").is_file()
    assert (folder / "tokens.svg").is_file()


QUERIES = cells_of((ROOT / "README.md").read_text(encoding="utf-8").partition("## Query")[2].partition("\n## ")[0])


def test_the_readme_has_queries_for_both_libraries() -> None:
    assert {cell.kind for cell in QUERIES} == {"sql", "python"}
    assert "polars" in next(cell.source for cell in QUERIES if cell.kind == "python")


@pytest.fixture
def demo(folder: Path) -> RunDir:
    config = synthetic_run.config_of(iterations=3, prompts=2, group_size=8, programs=8)
    return synthetic_run.write(folder / "data" / "runs" / "demo", config)


def statements(kind: str) -> list[str]:
    """The queries of a kind: SQL by semicolons, Python by the lines that print."""
    source = "".join(cell.source for cell in QUERIES if cell.kind == kind)
    return [each.strip() for each in source.split(";") if each.strip()] if kind == "sql" else [source]


def test_the_readme_s_queries_give_what_the_run_holds(demo: RunDir) -> None:
    import duckdb

    rewards = {i: history.summed_up(demo, i).reward for i in range(3)}
    answers = [duckdb.sql(query).fetchall() for query in statements("sql")]
    assert {row[0]: row[1] for row in answers[0]} == {
        i: pytest.approx(reward, abs=0.006) for i, reward in rewards.items()
    }
    assert all(answers)
    best = max(
        (row for i in range(3) for row in history.completions(demo, i).to_pylist()), key=lambda row: row["reward"]
    )
    assert answers[1][0][1] == pytest.approx(best["reward"], abs=0.006)
    scope: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(statements("python")[0], scope)
    import polars

    frames = [value for value in scope.values() if isinstance(value, polars.DataFrame)]
    assert frames
    assert all(len(frame) for frame in frames)
    by_iteration = dict(frames[0].select("iteration", "reward").iter_rows())
    assert by_iteration == pytest.approx(rewards)
