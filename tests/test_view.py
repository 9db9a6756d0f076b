"""The terminal browser driven by textual's Pilot, and the tokens it shows, against the tokenizer library."""

import asyncio
import html
import math
import re
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Static, TabbedContent

from flows import view
from flows.view import iterations
from flows.view.app import Browser, settled, snapshot
from flows.view.board import SPEEDS, Board
from flows.view.completion import CompletionPage, marked_lines
from flows.view.evaluations import HeldOutPage
from flows.view.iterations import GroupPage, IterationPage, RunPage
from flows.view.page import Help, Rows
from flows.view.runs import RunsPage
from flows.view.tokens import TokenView
from stages.artifacts import RunDir, StageId, history
from stages.config import UserError
from stages.runs import tokens
from tests import chromium, synthetic_run

CONFIG = synthetic_run.config_of(iterations=2, prompts=2, group_size=6, programs=6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return synthetic_run.write(tmp_path_factory.mktemp("view") / "demo", CONFIG)


@pytest.fixture(scope="module")
def matmul(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    config = synthetic_run.config_of(iterations=1, prompts=1, group_size=6, programs=4, task="matmul")
    return synthetic_run.write(tmp_path_factory.mktemp("view") / "matmul", config)


def drive(app: Browser, steps: Callable[[Any], Awaitable[None]], size: tuple[int, int] = (80, 24)) -> None:
    """Runs the browser without a terminal while `steps` presses its keys."""

    async def body() -> None:
        app.animation_level = "none"
        async with app.run_test(size=size, notifications=True) as pilot:
            await settled(pilot)
            await steps(pilot)

    asyncio.run(body())


async def press(pilot: Any, *keys: str) -> None:
    for key in keys:
        await pilot.press(key)
        await settled(pilot)


def seen(app: Browser) -> str:
    """What is on the screen, line by line, read back from its picture."""
    lines: dict[float, str] = {}
    for x, y, words in re.findall(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>', app.export_screenshot()):
        line = lines.get(float(y), "")
        column = round(float(x) / 12.2)  # the width that rich's pictures give a character
        lines[float(y)] = line.ljust(column) + html.unescape(words).replace("\xa0", " ")
    return "\n".join(lines[y] for y in sorted(lines))


def best_of(run: RunDir, iteration: int) -> dict[str, Any]:
    return max(history.completions(run, iteration).to_pylist(), key=lambda row: (row["reward"], row["completion_id"]))


def test_enter_goes_down_from_the_runs_to_a_completion_and_escape_back(run: RunDir) -> None:
    app = Browser(run.path)

    async def steps(pilot: Any) -> None:
        for page in (RunPage, IterationPage, GroupPage, CompletionPage):
            assert type(app.screen) is page
            if page is not CompletionPage:
                await press(pilot, "enter")
        assert app.screen.completion_id == "00000-000-000"
        for page in (GroupPage, IterationPage, RunPage, RunsPage, RunsPage):
            await press(pilot, "escape")
            assert type(app.screen) is page
        assert "demo" in seen(app)
        assert "done" in seen(app)

    drive(app, steps)


def test_a_long_run_is_shown_in_part_while_it_is_read(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iterations, "SHOWN_EVERY_S", 0.0)
    shown: list[tuple[int, str]] = []
    fill = RunPage.fill

    def watched(page: RunPage, found: Any) -> None:
        fill(page, found)
        shown.append((page.query_one("#of-iterations", Rows).row_count, found[2]))

    monkeypatch.setattr(RunPage, "fill", watched)

    async def steps(pilot: Any) -> None:
        assert shown[:2] == [(1, "1 of 2 iterations read"), (2, "2 of 2 iterations read")]
        assert shown[2][0] == 2
        assert shown[2][1].endswith("2 of 2 iterations scored, done")

    drive(Browser(run.path), steps)


def test_the_tables_show_the_figures_in_the_files(run: RunDir) -> None:
    app = Browser(run.path)

    async def steps(pilot: Any) -> None:
        for iteration in (0, 1):
            assert f"{history.summed_up(run, iteration).reward:.2f}" in seen(app)
        await press(pilot, "j", "enter")
        rows = [row for row in history.completions(run, 1).to_pylist() if row["group_index"] == 1]
        assert f"{sum(row['reward'] for row in rows) / 6:.2f}" in seen(app)
        await press(pilot, "j", "enter", "s")
        table = app.screen.query_one(Rows)
        shown = [str(row.key.value) for row in table.ordered_rows]
        by_reward = sorted(rows, key=lambda row: -row["reward"])
        assert [rows_by_id(rows)[name]["reward"] for name in shown] == [row["reward"] for row in by_reward]
        await press(pilot, "enter")
        assert app.screen.completion_id == shown[0]
        await press(pilot, "n", "n")
        assert app.screen.completion_id == shown[2]
        await press(pilot, "p")
        assert app.screen.completion_id == shown[1]

    drive(app, steps)


def rows_by_id(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["completion_id"]: row for row in rows}


def test_the_token_under_the_cursor_is_told_with_its_logprobs(run: RunDir) -> None:
    row = best_of(run, 1)
    app = Browser(run.path, completion=row["completion_id"], tab="tokens")

    async def steps(pilot: Any) -> None:
        shown = app.screen.query_one(TokenView)
        assert app.focused is shown
        await press(pilot, "right", "right")
        assert shown.at == 2
        logprob = row["engine_logprobs"][2]
        told = str(app.screen.query_one("#figures", Static).render())
        assert f"token 3 of {row['num_tokens']}, id {row['completion_ids'][2]}" in told
        assert f"engine {logprob:.3f}" in told
        assert f"{100 * math.exp(logprob):.3g} %" in told
        await press(pilot, "u")
        unlikely = [i for i, each in enumerate(row["engine_logprobs"]) if each < math.log(0.1)]
        assert shown.at == next(i for i in unlikely if i > 2)
        await press(pilot, "end")
        assert shown.at == row["num_tokens"] - 1
        assert shown.scroll_offset.y > 0  # the last token is in sight
        await press(pilot, "u")
        assert shown.at == unlikely[0]  # from the top again

    drive(app, steps)


def test_a_less_likely_token_has_a_stronger_colour(run: RunDir) -> None:
    row = best_of(run, 1)
    app = Browser(run.path, completion=row["completion_id"], tab="tokens")

    async def steps(pilot: Any) -> None:
        from textual.color import Color

        shown = app.screen.query_one(TokenView)
        ground = Color.parse(app.theme_variables["background"])
        wanted = Color.parse(app.theme_variables["warning"])
        colours = [shown.colour(math.log(chance), ground) for chance in (0.95, 0.6, 0.2, 0.05, 0.001)]
        distances = [sum(abs(a - b) for a, b in zip(each.rgb, wanted.rgb, strict=True)) for each in colours]
        assert colours[0] == ground
        assert distances == sorted(distances, reverse=True)
        assert len(set(distances)) == 5
        await press(pilot, "l")
        assert shown.mode == "trainer - engine"
        assert shown.value(0) == pytest.approx(synthetic_run.noise()[1] - row["engine_logprobs"][0], abs=1e-6)
        assert shown.colour(0.05, ground).g > shown.colour(0.05, ground).r  # likelier: green
        assert shown.colour(-0.05, ground).r > shown.colour(-0.05, ground).g

    drive(app, steps)


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (40, 12)])
def test_every_token_is_laid_out_once_and_in_order(run: RunDir, size: tuple[int, int]) -> None:
    row = best_of(run, 1)
    app = Browser(run.path, completion=row["completion_id"], tab="tokens")

    async def steps(pilot: Any) -> None:
        shown = app.screen.query_one(TokenView)
        laid = "".join(text for line in shown.lines for text, _ in line)
        assert laid.replace("\u21b5", "") == row["completion"].replace("\n", "")
        assert [i for line in shown.lines for _, i in line] == sorted(i for line in shown.lines for _, i in line)
        width = shown.scrollable_content_region.width
        assert all(sum(len(text) for text, _ in line) <= width for line in shown.lines)

    drive(app, steps, size)


def test_a_game_is_replayed_by_keys(run: RunDir) -> None:
    row = best_of(run, 1)
    app = Browser(run.path, completion=row["completion_id"], tab="cases")

    async def steps(pilot: Any) -> None:
        board = app.screen.query_one(Board)
        game = row["games"][0]
        assert board.at == len(board.frames) - 1 == game["moves"]
        assert board.frames[-1].score == game["score"]
        await press(pilot, "home", "right", "right")
        assert board.at == 2
        await press(pilot, "left")
        assert board.at == 1
        assert board.frames[1].letter == game["letters"][0]
        await press(pilot, "down")
        assert board.at == row["games"][1]["moves"]
        await press(pilot, "plus", "plus")
        assert board.speed == max(SPEEDS)
        await press(pilot, "minus", "minus", "minus", "home", "space")
        assert board.speed == min(SPEEDS)  # so slow that no busy machine plays the game to its end
        while board.at == 0:
            await asyncio.sleep(0.05)
        await press(pilot, "space")
        stopped = board.at
        assert stopped < row["games"][1]["moves"]
        await asyncio.sleep(1.5 / board.speed)
        assert board.at == stopped
        assert f"move {stopped} of {row['games'][1]['moves']}" in " ".join(seen(app).split())

    drive(app, steps)


def test_a_game_that_its_letters_do_not_replay_is_not_shown(tmp_path: Path) -> None:
    board = Board(size=4, target=2048)
    told: list[str] = []
    board.update = lambda content: told.append(str(content))  # type: ignore[method-assign,assignment,arg-type]
    board.show({**synthetic_run.played("greedy", 5), "score": 1})
    assert board.frames == []
    assert told[0].startswith("This game cannot be replayed.")
    board.show({**synthetic_run.played("greedy", 5), "letters": "AXQ"})
    assert board.frames == []


def test_evaluations_lead_to_their_programs_and_baselines(run: RunDir) -> None:
    app = Browser(run.path)

    async def steps(pilot: Any) -> None:
        await press(pilot, "2")
        assert app.screen.query_one(TabbedContent).active == "evaluations"
        assert "untrained" in seen(app)
        assert "look ahead" in seen(app)
        await press(pilot, "enter", "enter")
        assert app.screen.completion_id.startswith("e00000-")
        assert "No tokens are kept" not in seen(app)
        await press(pilot, "2")
        assert "No tokens are kept of this completion." in seen(app)
        await press(pilot, "escape", "escape", "end", "enter")
        assert type(app.screen) is HeldOutPage
        assert app.screen.row_of == {"kind": "baseline", "name": "look_ahead"}
        await press(pilot, "enter", "3")
        assert "def slide(row):" in seen(app)

    drive(app, steps)


def test_cases_of_another_task_are_a_table(matmul: RunDir) -> None:
    app = Browser(matmul.path, completion="00000-000-000", tab="cases")

    async def steps(pilot: Any) -> None:
        assert app.screen.query_one("#alone", Rows).row_count == 2
        text = seen(app)
        assert "speedup" in text
        assert "right" in text or "wrong" in text

    drive(app, steps, size=(120, 30))


def test_help_names_the_keys_and_a_completion_is_reached_by_its_id(run: RunDir) -> None:
    app = Browser(run.path, completion="00000-000-000")

    async def steps(pilot: Any) -> None:
        await press(pilot, "question_mark")
        assert isinstance(app.screen, Help)
        assert "next and previous completion" in seen(app)
        await press(pilot, "escape", "g")
        await pilot.press(*"00001-001-002")
        await press(pilot, "enter")
        assert app.screen.completion_id == "00001-001-002"
        await press(pilot, "g")
        await pilot.press(*"00009-001-002")
        await press(pilot, "enter")
        assert app.screen.completion_id == "00001-001-002"
        assert "has no scores" in seen(app)
        await press(pilot, "escape", "escape")
        assert type(app.screen) is IterationPage

    drive(app, steps)


def test_reading_again_keeps_the_row(run: RunDir) -> None:
    app = Browser(run.path)

    async def steps(pilot: Any) -> None:
        await press(pilot, "j", "r")
        assert app.screen.query_one("#of-iterations", Rows).cursor_row == 1
        await press(pilot, "enter")
        assert "iteration 1" in seen(app)

    drive(app, steps)


def test_colours_change_by_a_key(run: RunDir) -> None:
    app = Browser(run.path)

    async def steps(pilot: Any) -> None:
        assert app.current_theme.dark
        await press(pilot, "d")
        assert not app.current_theme.dark

    drive(app, steps)


def test_a_damaged_file_is_told_and_the_browser_goes_on(tmp_path: Path) -> None:
    run = synthetic_run.write(tmp_path / "bad", CONFIG, upto=StageId("score", 0))
    app = Browser(run.path)

    async def steps(pilot: Any) -> None:
        path = run.folder(StageId("score", 0)) / "scores-00000.parquet"
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        await press(pilot, "r")
        assert "is damaged" in seen(app)
        path.write_bytes(data)
        await press(pilot, "r", "enter")
        assert type(app.screen) is IterationPage

    drive(app, steps)


def test_what_a_model_wrote_cannot_steer_the_terminal(tmp_path: Path) -> None:
    hostile = "def strategy(board):\n    return '\x1b[2J\x1b]0;owned\x07[bold red]W[/]\r\u202e'"
    from tests.test_runs import scores_of

    config = synthetic_run.config_of(iterations=1, prompts=1, group_size=1)
    run = synthetic_run.write(
        tmp_path / "x", config, upto=StageId("score", 0), score=scores_of((0.0, "crash", hostile))
    )
    app = Browser(run.path, completion="00000-000-000", tab="program")

    async def steps(pilot: Any) -> None:
        text = seen(app)
        assert not {"\x1b", "\x07", "\r", "\u202e"} & set(text)
        assert "\\x1b[2J" in text
        assert "[bold red]W[/]" in text

    drive(app, steps, size=(120, 30))


def test_lines_that_the_verdict_speaks_of_are_marked() -> None:
    row = {"detail": "line 3: reaches for .__globals__", "state_kept": "lines 4, 7: writes global n"}
    assert marked_lines(row) == {3, 4, 7}
    assert marked_lines({"detail": None}) == set()


def test_tokens_are_those_of_the_tokenizer_library(run: RunDir) -> None:
    ids = list(range(1024))
    library = synthetic_run.tokenizer()
    known = tokens.vocabulary(Path("data/tiny/tokenizer.json"))
    assert "".join(tokens.texts(known, ids)) == library.decode(ids, skip_special_tokens=False)
    row = best_of(run, 0)
    shown = tokens.of(run, row["completion_id"])
    assert shown.worded
    assert "".join(token.text for token in shown.tokens) == row["completion"]
    assert [token.engine for token in shown.tokens] == row["engine_logprobs"]
    assert shown.tokens[0].trainer == pytest.approx(synthetic_run.noise()[1])
    assert shown.tokens[0].reference == pytest.approx(synthetic_run.noise()[2])


def test_a_character_of_several_tokens_is_shown_by_the_last_of_them() -> None:
    known = {0: b"\xe2\x82", 1: b"\xac", 2: b"a", 3: b"\xf0\x9f"}
    assert tokens.texts(known, [2, 0, 1, 2]) == ["a", "", "\u20ac", "a"]
    assert tokens.texts(known, [2, 3]) == ["a", "\ufffd"]
    assert tokens.texts(known, [9]) == ["\ufffd"]


def test_without_the_tokenizer_ids_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: RunDir) -> None:
    monkeypatch.setattr(tokens, "locate", lambda source: None)
    shown = tokens.of(run, "00000-000-000")
    assert not shown.worded
    assert shown.tokens[0].text == f"[{shown.tokens[0].id}]"


def picture(run: RunDir, path: Path, *words: str) -> str:
    parser = ArgumentParser()
    view.add_arguments(parser)
    args = parser.parse_args([str(run.path), "--snapshot", str(path), *words])
    assert snapshot(args) == path
    return path.read_text(encoding="utf-8")


def test_a_snapshot_is_a_picture_that_asks_nothing_of_a_network(run: RunDir, tmp_path: Path) -> None:
    text = picture(run, tmp_path / "view.svg")
    assert text.startswith("<svg")
    assert "url(http" not in text
    assert "2&#160;of&#160;2&#160;iterations" in text
    if chromium.BINARY:
        with chromium.Chromium(width=1000, height=700) as tab:
            tab.open(tmp_path / "view.svg")
            assert tab.requests == [(tmp_path / "view.svg").resolve().as_uri()]
            assert tab.complaints == []
    shown = picture(run, tmp_path / "tokens.svg", "--completion", "00001-000-000", "--tab", "tokens", "--size", "80x24")
    assert "logprob&#160;engine" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--completion", "00009-000-000"), "has no scores"),
        (("--completion", "abc"), "is no completion"),
    ],
)
def test_a_completion_that_is_not_there_is_one_error(
    run: RunDir, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        picture(run, tmp_path / "x.svg", *words)


def test_a_folder_that_is_not_there_and_no_terminal_are_errors_with_hints(tmp_path: Path, run: RunDir) -> None:
    with pytest.raises(UserError, match="holds no run"):
        Browser(tmp_path / "none")
    command = [sys.executable, "-m", "flows.cli", "view", str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert "needs a terminal" in done.stderr
    assert "--snapshot" in done.stderr


def test_the_arguments_are_declared_without_textual() -> None:
    code = (
        "import sys; from flows.cli import parser; parser()\n"
        "print([name for name in ('textual', 'pyarrow', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
