"""Inspecting and listing runs, against sums written out by hand and against the rows in the files."""

import dataclasses
import io
import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stages import runs
from stages.artifacts import RunDir, StageContext, StageId, history
from stages.artifacts.parquet import read_table, scores_schema, write_parts
from stages.config import UpdateConfig, UserError
from tests import synthetic_run

CONFIG = synthetic_run.config_of(iterations=3, prompts=2, group_size=8, programs=6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return synthetic_run.write(tmp_path_factory.mktemp("runs") / "demo", CONFIG)


def ask(run: RunDir, *words: str) -> Namespace:
    parser = ArgumentParser()
    runs.add_inspect_arguments(parser)
    return parser.parse_args([str(run.path), *words])


def answer(run: RunDir, capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert runs.inspect(ask(run, *words, "--json")) == 0
    return json.loads(capsys.readouterr().out)


def printed(run: RunDir, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert runs.inspect(ask(run, *words)) == 0
    return capsys.readouterr().out


def scores_of(*verdicts: tuple[float, str, str]):
    """A score stage that gives these (reward, outcome, program) in order."""

    def score(context: StageContext) -> None:
        rows = read_table(context.input(StageId("rollout", context.stage.index)), "rollouts").to_pylist()
        scores = [
            {"completion_id": row["completion_id"], "outcome": outcome, "reward": reward, "reward_works": reward,
             "program": program, "detail": program}
            for row, (reward, outcome, program) in zip(rows, verdicts, strict=True)
        ]  # fmt: skip
        write_parts(context.out, "scores", scores, scores_schema(["works"]))

    return score


def test_an_iteration_is_summed_up_as_by_hand(tmp_path: Path) -> None:
    config = synthetic_run.config_of(iterations=1, prompts=2, group_size=2)
    verdicts = scores_of((1.0, "ok", "a"), (3.0, "ok", "b"), (-1.0, "cheat", "c"), (-1.0, "timeout", "d"))
    run = synthetic_run.write(tmp_path / "hand", config, upto=StageId("score", 0), score=verdicts)
    seen = history.summed_up(run, 0)
    assert (seen.completions, seen.groups, seen.silent_groups) == (4, 2, 1)
    assert seen.reward == pytest.approx(0.5)
    assert seen.spread == pytest.approx((1.0 + 0.0) / 2)  # population standard deviations of (1, 3) and (-1, -1)
    # Group means 2 and -1: sample standard deviation 3 / sqrt 2, over sqrt 2 groups.
    assert seen.reward_error == pytest.approx(1.5)
    assert (seen.reward_low, seen.reward_high) == pytest.approx((-1.0, 1.5))
    assert seen.outcomes == {"ok": 2, "cheat": 1, "timeout": 1}
    assert seen.metrics == {}


def test_scores_are_joined_by_id_whatever_their_order(tmp_path: Path) -> None:
    def backwards(context: StageContext) -> None:
        rows = read_table(context.input(StageId("rollout", 0)), "rollouts").to_pylist()
        scores = [
            {
                "completion_id": row["completion_id"],
                "outcome": "ok",
                "reward": float(row["sample_index"]),
                "reward_works": 0.0,
            }
            for row in reversed(rows)
        ]
        write_parts(context.out, "scores", scores, scores_schema(["works"]))

    config = synthetic_run.config_of(iterations=1, prompts=2, group_size=3)
    run = synthetic_run.write(tmp_path / "back", config, upto=StageId("score", 0), score=backwards)
    rows = history.completions(run, 0).to_pylist()
    assert len(rows) == 6
    assert all(row["reward"] == row["sample_index"] for row in rows)
    assert all(int(row["completion_id"].split("-")[1]) == row["group_index"] for row in rows)


def test_metrics_are_averaged_over_optimizer_steps(run: RunDir) -> None:
    files = run.folder(StageId("update", 1)).glob("metrics*.parquet")
    rows = [row for path in files for row in pq.read_table(path).to_pylist()]
    seen = history.summed_up(run, 1).metrics
    for name in ("kl", "entropy", "grad_norm"):
        assert seen[name] == pytest.approx(sum(row[name] for row in rows) / len(rows))


def test_a_divergence_that_was_not_measured_is_not_shown(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, update=UpdateConfig(kl=0.0))
    run = synthetic_run.write(tmp_path / "unmeasured", config, upto=StageId("update", 0))
    seen = history.summed_up(run, 0).metrics
    assert "kl" not in seen
    assert "entropy" in seen


def test_the_overview_names_every_iteration_and_every_player(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    seen = answer(run, capsys)
    assert [row["index"] for row in seen["iterations"]] == [0, 1, 2]
    assert {(row["updates"], row["kind"]) for row in seen["evaluations"]} == {
        (0, "policy"),
        (0, "baseline"),
        (3, "policy"),
        (3, "baseline"),
    }
    text = printed(run, capsys)
    assert "3 of 3 iterations scored" in text
    for player in ("untrained", "after 3 updates", "random", "fixed order", "greedy", "look ahead"):
        assert player in text


def test_the_groups_of_an_iteration_name_their_best_and_worst(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    groups = answer(run, capsys, "--iteration", "1")["groups"]
    rows = history.completions(run, 1).to_pylist()
    for group in groups:
        members = {row["completion_id"]: row["reward"] for row in rows if row["group_index"] == group["group"]}
        assert len(members) == group["completions"] == 8
        assert group["best"]["reward"] == max(members.values()) == members[group["best"]["completion_id"]]
        assert group["worst"]["reward"] == min(members.values()) == members[group["worst"]["completion_id"]]
        assert group["mean"] == pytest.approx(sum(members.values()) / 8)


def test_top_gives_the_best_first_and_worst_turns_it_round(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = sorted((row["reward"] for i in range(3) for row in history.completions(run, i).to_pylist()), reverse=True)
    best = answer(run, capsys, "--top", "5")["completions"]
    assert [row["reward"] for row in best] == rewards[:5]
    worst = answer(run, capsys, "--top", "5", "--worst")["completions"]
    assert [row["reward"] for row in worst] == rewards[:-6:-1]


def test_filters_keep_what_they_name(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    everything = [row for i in range(3) for row in history.completions(run, i).to_pylist()]
    cheats = answer(run, capsys, "--outcome", "cheat", "--top", "99")["completions"]
    assert {row["completion_id"] for row in cheats} == {
        row["completion_id"] for row in everything if row["outcome"] == "cheat"
    }
    good = answer(run, capsys, "--min-reward", "2.0", "--iteration", "2", "--group", "1", "--top", "99")["completions"]
    assert {row["completion_id"] for row in good} == {
        row["completion_id"]
        for row in everything
        if row["reward"] >= 2.0 and (row["iteration"], row["group_index"]) == (2, 1)
    }
    assert "No completion matches." in printed(run, capsys, "--min-reward", "99")


def test_checks_and_texts_are_filters_too(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    everything = [row for i in range(3) for row in history.completions(run, i).to_pylist()]
    for words, kept in (
        (("--check", "depends_on_random=yes"), lambda row: row["depends_on_random"] is True),
        (("--check", "depends_on_board=unknown"), lambda row: row["depends_on_board"] is None),
        (
            ("--check", "depends_on_calls=no", "--check", "state_kept=no"),
            lambda row: row["depends_on_calls"] is False and row["state_kept"] == "",
        ),
        (("--contains", "import random"), lambda row: "import random" in (row["program"] or "")),
        (("--max-reward", "0"), lambda row: row["reward"] <= 0),
    ):
        found = {row["completion_id"] for row in answer(run, capsys, *words, "--top", "999")["completions"]}
        assert found == {row["completion_id"] for row in everything if kept(row)}
        assert 0 < len(found) < len(everything)


def test_checks_of_programs_that_ended_well_are_counted(run: RunDir) -> None:
    for i in range(3):
        rows = [row for row in history.completions(run, i).to_pylist() if row["outcome"] == "ok"]
        seen = history.summed_up(run, i)
        assert seen.checks["depends_on_random"] == {
            "yes": sum(row["depends_on_random"] is True for row in rows),
            "no": sum(row["depends_on_random"] is False for row in rows),
            "unknown": sum(row["depends_on_random"] is None for row in rows),
        }
        assert seen.checks["state_kept"]["yes"] == 0
        everyone = history.completions(run, i).to_pylist()
        assert seen.parts["strategy"] == pytest.approx(sum(row["reward_strategy"] for row in everyone) / len(everyone))


def test_a_state_that_may_be_kept_counts_as_yes(tmp_path: Path) -> None:
    def score(context: StageContext) -> None:
        rows = read_table(context.input(StageId("rollout", 0)), "rollouts").to_pylist()
        kept = ["line 2: writes global n", "", None, ""]
        scores = [
            {
                "completion_id": row["completion_id"],
                "outcome": "ok",
                "reward": 0.0,
                "reward_works": 0.0,
                "state_kept": each,
            }
            for row, each in zip(rows, kept, strict=True)
        ]
        write_parts(context.out, "scores", scores, scores_schema(["works"]))

    config = synthetic_run.config_of(iterations=1, prompts=1, group_size=4)
    run = synthetic_run.write(tmp_path / "kept", config, upto=StageId("score", 0), score=score)
    assert history.summed_up(run, 0).checks["state_kept"] == {"yes": 1, "no": 2, "unknown": 1}


def test_tables_fit_a_narrow_terminal(run: RunDir) -> None:
    from rich.console import Console

    from stages.runs import show, tables

    rows = [dataclasses.asdict(history.summed_up(run, i)) for i in range(3)]
    for width in (80, 130):
        out = Console(width=width, record=True, file=io.StringIO())
        out.print(tables.iterations(rows, width=width))
        out.print(tables.groups(show.groups(run, 1), width=width))
        text = out.export_text()
        assert "\u2026" not in text  # nothing is cut short
        assert f"{rows[0]['reward']:.2f} \u00b1{rows[0]['reward_error']:.2f}" in text


def test_an_iteration_says_what_its_programs_depend_on(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row for row in history.completions(run, 1).to_pylist() if row["outcome"] == "ok"]
    drawn = [row["depends_on_random"] for row in rows if row["depends_on_random"] is not None]
    assert f"{sum(drawn)} of {len(drawn)} draw random numbers" in printed(run, capsys, "--iteration", "1")


def test_two_iterations_are_compared_as_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def score(context: StageContext) -> None:
        worth = [0.0, 2.0, 1.0, 1.0] if context.stage.index == 0 else [5.0, 5.0, 3.0, 7.0]
        ends = ["ok", "ok", "cheat", "ok"] if context.stage.index == 0 else ["ok"] * 4
        programs = ["a\nb\n", "a\nc\n", "z\n", "a\nb\n"] if context.stage.index == 0 else ["a\nb\n"] * 3 + ["a\nd\n"]
        rows = read_table(context.input(StageId("rollout", context.stage.index)), "rollouts").to_pylist()
        scores = [
            {"completion_id": row["completion_id"], "outcome": end, "reward": each, "reward_works": each,
             "program": program}
            for row, each, end, program in zip(rows, worth, ends, programs, strict=True)
        ]  # fmt: skip
        write_parts(context.out, "scores", scores, scores_schema(["works"]))

    config = synthetic_run.config_of(iterations=2, prompts=2, group_size=2)
    run = synthetic_run.write(tmp_path / "pair", config, upto=StageId("score", 1), score=score)
    seen = answer(run, capsys, "--diff", "0", "1")["diff"]
    # Group means 1, 1 and 5, 5: both standard errors are 0, so there is nothing to divide by.
    assert seen["reward"] == {"from": 1.0, "to": 5.0, "change": 4.0, "standard_errors": None}
    figures = {row["name"]: (row["from"], row["to"], row["change"]) for row in seen["figures"]}
    assert figures["share: ok"] == (0.75, 1.0, 0.25)
    assert figures["share: cheat"] == (0.25, 0.0, -0.25)
    assert figures["reward: works"] == (1.0, 5.0, 4.0)
    assert figures["spread inside a group"] == (0.5, 1.0, 0.5)  # population deviations 1, 0 and 0, 2
    assert seen["programs"] == {"from": 3, "to": 2, "common": 1}
    assert (seen["best"]["from"], seen["best"]["to"]) == ("00000-000-001", "00001-001-001")
    assert [line for line in seen["best"]["diff"].splitlines() if line[0] in "+-"][2:] == ["-c", "+d"]
    assert "iteration 0 -> 1" in printed(run, capsys, "--diff", "0", "1")


def test_tokens_of_a_completion_are_told_with_their_logprobs(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    row = history.completions(run, 0).to_pylist()[0]
    seen = answer(run, capsys, "--completion", row["completion_id"], "--tokens")["tokens"]
    assert [token["id"] for token in seen] == row["completion_ids"]
    assert "".join(token["text"] for token in seen) == row["completion"]
    assert [token["engine"] for token in seen] == row["engine_logprobs"]
    text = printed(run, capsys, "--completion", row["completion_id"], "--tokens")
    assert f"{row['engine_logprobs'][1]:.4f}" in text


def test_one_completion_shows_prompt_answer_program_and_games(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    best = answer(run, capsys, "--top", "1")["completions"][0]
    text = printed(run, capsys, "--completion", best["completion_id"])
    flat = " ".join(text.replace("\u2502", " ").split())
    assert best["prompt"][:60] in flat
    assert "<|channel|>final" in flat
    assert "def strategy(board):" in flat
    assert "advantage" in flat
    for game in best["games"]:
        assert f"{game['seed']} {game['moves']} {game['max_tile']} {game['score']} {game['state']}" in flat


def test_one_completion_of_an_evaluation_is_found_by_its_id(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    seen = answer(run, capsys, "--completion", "e00003-0004")
    assert seen["completion_id"] == "e00003-0004"
    assert seen["completion"].startswith("<|channel|>analysis")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--iteration", "7"), "iteration 7 of .* has no scores"),
        (("--iteration", "1", "--group", "9"), "there is no group 9"),
        (("--outcome", "cheet"), "cheet"),
        (("--completion", "00001-009-001"), "has no completion 00001-009-001"),
        (("--completion", "abc"), "'abc' is no completion"),
        (("--check", "depends_on_bord=no"), "unknown check 'depends_on_bord'"),
        (("--check", "depends_on_board"), "is no answer"),
        (("--tokens",), "--tokens is of one completion"),
        (("--diff", "0", "9"), "iteration 9 of .* has no scores"),
        (("--completion", "e00001-0001"), "no evaluation after 1 updates"),
        (("--completion", "e00003-9999"), "no completion e00003-9999"),
    ],
)
def test_asking_for_what_is_not_there_is_one_error_with_a_hint(
    run: RunDir, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        runs.inspect(ask(run, *words))
    assert caught.value.hint


def test_a_folder_without_a_run_is_one_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run") as caught:
        runs.inspect(ask(RunDir(tmp_path)))
    assert "flexsink runs" in caught.value.hint


def test_a_flipped_bit_is_an_error_and_not_a_wrong_figure(tmp_path: Path) -> None:
    run = synthetic_run.write(tmp_path / "flip", CONFIG, upto=StageId("score", 0))
    path = run.folder(StageId("score", 0)) / "scores-00000.parquet"
    column = pq.ParquetFile(path).metadata.row_group(0).column(2)
    assert column.path_in_schema == "reward"
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        runs.inspect(ask(run))


def test_what_a_model_wrote_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = synthetic_run.config_of(iterations=1, prompts=1, group_size=1)
    hostile = "def strategy(board):\n    return '\x1b[2J\x1b]0;owned\x07[bold red]W[/]\r\u202e'"
    run = synthetic_run.write(
        tmp_path / "x", config, upto=StageId("score", 0), score=scores_of((0.0, "crash", hostile))
    )
    text = printed(run, capsys, "--top", "1")
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(text)
    assert r"\x1b[2J" in text
    assert "[bold red]W[/]" in text


def test_runs_lists_state_iterations_reward_and_size(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = synthetic_run.write(tmp_path / "done", CONFIG)
    stopped = synthetic_run.write(tmp_path / "stopped", CONFIG, upto=StageId("score", 1))
    synthetic_run.write(tmp_path / "new", CONFIG, upto=StageId("load"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "environment.json").write_text("{}")
    (tmp_path / "broken" / "config.json").write_text('{"nonsense": 1}')
    (tmp_path / "no run").mkdir()
    parser = ArgumentParser()
    runs.add_runs_arguments(parser)
    with pytest.raises(UserError, match="new is a run, not a folder of runs"):
        runs.list_runs(parser.parse_args([str(tmp_path / "new")]))
    assert runs.list_runs(parser.parse_args([str(tmp_path), "--json"])) == 0
    seen = {Path(row["run"]).name: row for row in json.loads(capsys.readouterr().out)}
    assert set(seen) == {"done", "stopped", "new", "broken"}
    assert (seen["done"]["state"], seen["done"]["iterations"], seen["done"]["planned"]) == ("done", 3, 3)
    assert (seen["stopped"]["state"], seen["stopped"]["iterations"]) == ("stopped", 1)
    assert seen["new"]["first_reward"] is None
    assert seen["broken"]["state"].startswith("broken: ")
    for name, each in (("done", done), ("stopped", stopped)):
        last = history.scored(each)[-1]
        rewards = [row["reward"] for row in history.completions(each, last).to_pylist()]
        assert seen[name]["last_reward"] == pytest.approx(sum(rewards) / len(rewards))
        assert seen[name]["bytes"] == sum(path.stat().st_size for path in each.path.rglob("*") if path.is_file())
    assert runs.list_runs(parser.parse_args([str(tmp_path)])) == 0
    assert "1 of 3" in capsys.readouterr().out


def test_a_run_that_a_process_works_on_is_listed_as_running(tmp_path: Path) -> None:
    from stages.runs.listing import listed

    run = synthetic_run.write(tmp_path / "held", CONFIG, upto=StageId("load"))
    with run.lock():
        assert listed(run.path)["state"] == "running"
        with pytest.raises(UserError), run.lock():
            pass
    assert listed(run.path)["state"] == "stopped"
    with run.lock():
        pass  # looking at it left the lock free


def test_declaring_the_arguments_imports_nothing_heavy() -> None:
    code = (
        "import argparse, sys; from stages import runs, report; p = argparse.ArgumentParser();"
        "runs.add_inspect_arguments(p); runs.add_runs_arguments(argparse.ArgumentParser());"
        "report.add_arguments(argparse.ArgumentParser());"
        "print([name for name in ('torch', 'pyarrow', 'rich', 'prefect', 'docker') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_a_run_back_needs_no_torch(run: RunDir) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import argparse; from pathlib import Path; from stages import runs, report\n"
        "p = argparse.ArgumentParser(); runs.add_inspect_arguments(p)\n"
        f"runs.inspect(p.parse_args([{str(run.path)!r}, '--json']))\n"
        f"report.write_report(Path({str(run.path)!r}))\n"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.path / "report.html").is_file()
