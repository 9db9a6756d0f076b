"""What the columns beside a score say: of programs in real sandboxes that depend on the board, on calls, on chance."""

import json
from collections.abc import Iterator

import pytest

from stages.config import SandboxConfig
from stages.sandbox import Job, Limits, Outcome, Result, SandboxPool, open_pool
from stages.tasks import checks, judging, registry
from tests.patience import PATIENCE_S

TASK = registry.get("game2048", {"games": 2, "max_moves": 40})
SEEDS = (3, 14)
LIMITS = Limits(cpu_s=5)
NOTHING = dict.fromkeys(checks.COLUMNS)
BROKEN_PROBE = """
def judge(cases, ask):
    for case in cases:
        yield {"answer": ask(b"1").decode()}

def probe(cases, ask):
    ask(b"2")
    return {"depends_on_board": True}

def serve(function, receive, send):
    while question := receive():
        send(function(question.decode()).encode())
"""


def result(outcome=Outcome.ok, notes=None, **checked):
    text = "" if notes is None else json.dumps(notes)
    return Result(job_id="x", outcome=outcome, detail="", cases=(), notes=text, checks=checked)


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    harnesses = {TASK.name: TASK.harness_source(), "probed": BROKEN_PROBE}
    with open_pool(SandboxConfig(containers=1), harnesses=harnesses, labels={"flexsink.run": "test-checks"}) as opened:
        yield opened


def seen(pool, program, *, size=4):
    """The columns of a program that is judged on 2048."""
    task = registry.get("game2048", {"max_moves": 40, "size": size})
    outcome = pool.submit(task.job("test", program, SEEDS, LIMITS)).result(timeout=PATIENCE_S)
    assert outcome.outcome is Outcome.ok, outcome.detail
    return checks.columns_of(outcome)


def columns(board, calls, chance, state=""):
    return dict(zip(checks.COLUMNS, (board, calls, chance, False, state), strict=True))


def test_what_never_ran_or_was_not_noted_has_no_column_filled():
    assert checks.columns_of(None) == NOTHING
    assert checks.columns_of(result(Outcome.syntax_error)) == NOTHING
    for text in ("[]", '{"state": 3}', "{", '"x"', "null"):
        forged = Result(job_id="x", outcome=Outcome.ok, detail="", cases=(), notes=text)
        assert checks.columns_of(forged) == NOTHING


def test_the_text_completes_what_the_probe_could_not_tell():
    notes = {"reads_argument": True, "state": ""}
    seen = {"depends_on_board": True, "depends_on_calls": False, "depends_on_random": False}
    assert checks.columns_of(result(notes=notes, **seen)) == columns(True, False, False)
    kept = notes | {"state": "line 4: writes global n"}
    assert checks.columns_of(result(notes=kept, **seen)) == columns(True, None, False, kept["state"])
    blind = {"reads_argument": False, "state": ""}
    assert checks.columns_of(result(notes=blind)) == columns(False, None, None)


def test_a_program_that_was_caught_may_have_a_clock_after_all():
    notes = {"reads_argument": True, "state": ""}
    for outcome in (Outcome.cheat, Outcome.foreign_import):
        assert checks.columns_of(result(outcome, notes))["depends_on_time"] is None
    assert checks.columns_of(result(Outcome.timeout, notes))["depends_on_time"] is False


def test_a_harness_can_say_nothing_but_yes_no_and_unknown():
    notes = {"reads_argument": True, "state": ""}
    found = checks.columns_of(result(notes=notes, depends_on_board="maybe", depends_on_calls=1, reward=3))
    assert found == columns(None, None, None)


@pytest.mark.docker
@pytest.mark.parametrize("size", [3, 4, 8])
def test_each_way_of_choosing_a_move_is_told_from_the_others(pool, size):
    told = {
        "def strategy(board):\n    return 'A'\n": columns(False, False, False),
        "def strategy(board):\n    return 'WASD'[sum(map(sum, board)) // 2 % 4]\n": columns(True, False, False),
        "import random\ndef strategy(board):\n    return random.choice('WASD')\n": columns(False, True, True),
        "import random\ndef strategy(board):\n    return random.choice('WASD'[board[0][0] > 0:])\n": columns(
            True, True, True
        ),
        "n = 0\ndef strategy(board):\n    global n\n    n += 1\n    return 'WASD'[n % 4]\n": columns(
            False, True, None, "line 4: writes global n"
        ),
        "n = 0\ndef strategy(board):\n    global n\n    n += 1\n    return 'WASD'[(n + board[0][0]) % 4]\n": columns(
            None, True, None, "line 4: writes global n"
        ),
        "import functools\n@functools.cache\ndef best(board):\n    return 'WASD'[sum(board) // 2 % 4]\n"
        "def strategy(board):\n    return best(tuple(map(sum, board)))\n": columns(
            True, None, False, "line 2: keeps results of best in a cache"
        ),
        "import random\nown = random.Random(3)\ndef strategy(board):\n    return own.choice('WASD')\n": columns(
            False, True, None
        ),
    }
    for program, expected in told.items():
        assert seen(pool, program, size=size) == expected, program


@pytest.mark.docker
def test_the_probe_changes_neither_games_nor_outcomes(pool):
    without = TASK.harness_source().replace("def probe(", "def unused(")
    labels = {"flexsink.run": "test-checks-plain"}
    programs = [
        TASK.baselines()["greedy"],
        "import random\ndef strategy(board):\n    return random.choice('WASD')\n",
        "n = 0\ndef strategy(board):\n    global n\n    n += 1\n    return 'WASD'[n % 4]\n",
        "def strategy(board):\n    return None\n",
        "def strategy(board):\n    return 1 // (sum(map(sum, board)) < 20) and 'A'\n",
        "def strategy(board):\n    n = sum(map(sum, board))\n    while n > 40: pass\n    return 'WASD'[n // 2 % 4]\n",
    ]
    limits = Limits(cpu_s=0.5)
    with open_pool(SandboxConfig(containers=1), harnesses={TASK.name: without}, labels=labels) as plain:
        for program in programs:
            job = TASK.job("test", program, SEEDS, limits)
            probed, unprobed = (each.submit(job).result(timeout=PATIENCE_S) for each in (pool, plain))
            assert (probed.outcome, probed.detail, probed.cases) == (unprobed.outcome, unprobed.detail, unprobed.cases)
            assert unprobed.checks == {}


@pytest.mark.docker
@pytest.mark.parametrize(
    "act",
    ["raise ValueError", "while True: pass", "return 'x' * 10 ** 9", "return None", "pass"],
)
def test_a_program_that_fails_when_it_is_only_probed_keeps_its_verdict(pool, act):
    program = f"def answer(question):\n    if question == '2':\n        {act}\n    return 'yes'\n"
    job = Job(job_id="x", program=program, entry="answer", harness="probed", cases=({}, {}), limits=LIMITS)
    result = pool.submit(job).result(timeout=PATIENCE_S)
    assert (result.outcome, result.detail) == (Outcome.ok, "")
    assert result.cases == ({"answer": "yes"},) * 2
    assert result.checks == ({"depends_on_board": True} if act == "pass" else {})
    assert result.cpu_s < 1


@pytest.mark.docker
@pytest.mark.parametrize(
    "act", ["getattr((), '__cla' + 'ss__')", "__import__('os').getpid()", "__import__('os').write(1, b'x')"]
)
def test_a_cheat_is_a_cheat_even_when_it_is_only_probed(pool, act):
    program = f"def answer(question):\n    if question == '2':\n        {act}\n    return 'yes'\n"
    guarded = "getattr" in act
    job = Job(
        job_id="x", program=program, entry="answer", harness="probed", cases=({},), limits=LIMITS, guarded=guarded
    )
    result = pool.submit(job).result(timeout=PATIENCE_S)
    assert result.outcome is Outcome.cheat
    assert checks.columns_of(result)["depends_on_time"] is None


@pytest.mark.docker
def test_rows_that_a_judge_yields_before_the_program_fails_are_kept(pool):
    program = "n = 0\ndef answer(question):\n    global n\n    n += 1\n    return 'yes' if n < 3 else 1 // 0\n"
    job = Job(job_id="x", program=program, entry="answer", harness="probed", cases=({},) * 4, limits=LIMITS)
    result = pool.submit(job).result(timeout=PATIENCE_S)
    assert result.outcome is Outcome.crash
    assert result.cases == ({"answer": "yes"},) * 2
    assert checks.columns_of(result)["state_kept"] == "line 4: writes global n"


@pytest.mark.docker
def test_a_refusal_names_the_act_and_its_line_in_the_score(pool):
    program = "import math\ndef strategy(board):\n    return strategy.__globals__['math']\n"
    attempt = judging.Attempt("x", program, SEEDS)
    (score,) = judging.judge([attempt], task=TASK, pool=pool, limits=LIMITS)
    assert score.outcome is Outcome.cheat
    assert score.detail == "line 3: reaches for .__globals__: return strategy.__globals__['math']"
    assert score.checks == NOTHING


@pytest.mark.docker
def test_a_score_comes_back_from_its_journal_with_its_checks(pool):
    program = "def strategy(board):\n    return 'A'\n"
    (score,) = judging.judge([judging.Attempt("x", program, SEEDS)], task=TASK, pool=pool, limits=LIMITS)
    assert score.checks == columns(False, False, False)
    record = json.loads(json.dumps(judging.to_record(score)))
    assert judging.from_record(record) == score
    del record["checks"]
    assert judging.from_record(record).checks == {}
