"""What a person sees while a run goes on: the time left, the live bars, and what is left of them in a file."""

import io
import json

import pytest

from flows import progress
from flows.progress import Bars, Clock, JsonLines, Lines, described, terminal
from stages.artifacts import Progress, StageId

STAGES = [StageId(name, index) for index in range(3) for name in ("rollout", "score", "update")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of flows.progress: its last element is the time."""
    times = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: times[-1])
    return times


def test_the_time_left_is_known_after_one_iteration_and_shrinks_while_a_stage_is_at_work(now: list[float]) -> None:
    clock = Clock([*STAGES, StageId("export", 3, "mxfp4")])
    for stage, seconds in zip(STAGES[:3], (8.0, 1.0, 3.0), strict=True):
        assert clock.left_s() is None
        clock.finish(stage, seconds=seconds, reused=False)
    assert clock.left_s() == 24.0
    now.append(105.0)
    assert clock.left_s() == 19.0
    now.append(1000.0)
    assert clock.left_s() == 16.0  # a stage that takes longer than before has no time left, the others have all of it


def test_reused_stages_teach_nothing_of_the_time(now: list[float]) -> None:
    clock = Clock(STAGES)
    for stage in STAGES[:3]:
        clock.finish(stage, seconds=0.01, reused=True)
    assert clock.left_s() is None
    assert clock.done == 3


def run_through(view: Lines) -> None:
    with view:
        view.expect(STAGES)
        for stage in STAGES[:4]:
            view.start(stage)
            if stage.name == "rollout":
                view.report(Progress(str(stage), 3, 8, "completions", {"tokens/s": 5100.0, "judged": 2, "waiting": 1}))
            if stage.name == "score":
                view.report(Progress(str(stage), 8, 8, "completions", {"mean reward": 2.914}))
            if isinstance(view, Bars):
                view.bars.refresh()
            view.finish(stage, seconds=60.0, reused=False)


def test_the_bars_show_speed_queue_reward_and_the_time_left_and_leave_lines_alone_behind(
    now: list[float],
) -> None:
    out = Terminal()
    view = terminal("text", out)
    assert isinstance(view, Bars)
    run_through(view)
    shown = out.getvalue()
    for text in ("tokens/s 5100", "judged 2", "waiting 1", "3/8", "3/9", "reward 2.914", "0:06:00 left"):
        assert text in shown
    plain = io.StringIO()
    run_through(terminal("text", plain))
    lines = plain.getvalue().splitlines()
    assert lines == [
        "rollout 0        60.0 s  3 completions     tokens/s 5100  judged 2  waiting 1",
        "score 0          60.0 s  8 completions     mean reward 2.914",
        "update 0         60.0 s",
        "rollout 1        60.0 s  3 completions     tokens/s 5100  judged 2  waiting 1",
    ]
    for line in lines:
        assert line in shown


def test_json_tells_how_far_a_long_stage_is_now_and_then(now: list[float]) -> None:
    out = io.StringIO()
    view = terminal("json", out)
    assert isinstance(view, JsonLines)
    view.expect(STAGES)
    view.start(STAGES[0])
    for second in range(0, 25):
        now.append(100.0 + second)
        view.report(Progress("rollout 0", second, 30, "completions", {"tokens/s": 5100.0}))
    view.finish(STAGES[0], seconds=25.0, reused=False)
    view.finish(STAGES[1], seconds=0.0, reused=True)
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["started", "progress", "progress", "finished", "reused"]
    assert [event.get("done") for event in events] == [None, 10, 20, 24, None]
    assert events[3]["seconds"] == 25.0
    assert all(event["time"].endswith("+00:00") for event in events)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (Progress("rollout 3", 12, 48, "completions", {"tokens/s": 5100}), "12 of 48 completions, tokens/s 5100"),
        (Progress("load", 1, 1, "model"), "1 of 1 model"),
    ],
)
def test_a_progress_in_words(what: Progress, text: str) -> None:
    assert described(what) == f"{what.stage}: {text}"
    assert described(Progress("load", 0, 0)) == "load"
