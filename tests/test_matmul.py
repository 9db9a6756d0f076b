"""The matmul task without a sandbox: what its judge asks and believes, what its rewards add up to."""

import ast
import itertools
import math
import struct
import sys
import time
from fractions import Fraction

import pytest

from stages.config import UserError
from stages.sandbox.protocol import Outcome, Result
from stages.tasks import judging, registry
from stages.tasks.matmul.baselines import BASELINES
from stages.tasks.matmul.task import Matmul
from tests.program_pipes import Ended, judge, program_process

TASK = Matmul()


@pytest.fixture(scope="module")
def harness():
    namespace = {"__name__": "harness"}
    exec(compile(TASK.harness_source(), "<harness>", "exec"), namespace)
    return namespace


def cases(*seeds, smallest=8, largest=12, trials=2):
    return [{"seed": seed, "smallest": smallest, "largest": largest, "trials": trials} for seed in seeds]


def judged(harness, program, *seeds, **sizes):
    return judge(harness, program, cases(*seeds, **sizes), entry="matmul")


def right(A, B):
    """The product in exact arithmetic, rounded once at the end."""
    columns = [list(map(Fraction, column)) for column in zip(*B, strict=True)]
    return [[float(sum(Fraction(x) * y for x, y in zip(row, column, strict=True))) for column in columns] for row in A]


def plain(A, B):
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*B, strict=True)] for row in A]


def touched(change):
    """A right program that does something to A, B or its product C before it answers."""
    lines = ("product = matmul", "def matmul(A, B):", "    C = product(A, B)", f"    {change}", "    return C", "")
    return "\n".join([BASELINES["columns_once"], *lines])


class Scripted:
    """A program that answers as told and uses as much CPU time as told: ask() and cpu_used() without a process."""

    def __init__(self, harness, function=plain, *, before_s=0.0, during_s=0.001):
        self.harness, self.function = harness, function
        self.before_s, self.during_s = before_s, during_s
        self.clock = 0.0
        self.asked = []

    def __call__(self, question):
        self.asked.append(question)
        self.clock += self.during_s
        return self.harness["answer"](self.function, question)

    def cpu_used(self):
        self.clock += self.before_s
        return self.clock


def matrices(question):
    rows, inner, columns = struct.unpack_from("<HHH", question)
    flat = struct.unpack_from(f"<{rows * inner + inner * columns}d", question, 6)
    return (rows, inner, columns), flat


# What is asked


def test_the_shipped_text_stands_alone_and_imports_the_standard_library_only():
    tree = ast.parse(TASK.harness_source())
    modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert modules
    assert set(modules) <= sys.stdlib_module_names
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def test_odd_shapes_are_asked_in_every_case_and_differ_from_case_to_case(harness):
    seen = set()
    for seed in range(12):
        ask = Scripted(harness)
        (record,) = harness["judge"](cases(seed), ask)
        assert record["state"] == "right"
        shapes = [matrices(question)[0] for question in ask.asked]
        seen.add(tuple(shapes))
        assert record["products"] == len(shapes) == 9 + 1 + 2
        assert (1, 1, 1) in shapes
        assert any(rows == columns == 1 < inner for rows, inner, columns in shapes)
        assert any(inner == 1 < min(rows, columns) for rows, inner, columns in shapes)
        assert any(rows == 1 < min(inner, columns) for rows, inner, columns in shapes)
        assert any(columns == 1 < min(rows, inner) for rows, inner, columns in shapes)
        assert any(len({*shape, 2, 3, 5, 7, 11, 13}) == 6 and len(set(shape)) == 3 for shape in shapes)
        assert any(rows == inner == columns > 1 for rows, inner, columns in shapes)
        assert len(set(shapes[-3:])) == 1, "the timed calls are of one shape"
    assert len(seen) == 12


def test_no_call_gets_inputs_that_another_one_had(harness):
    ask = Scripted(harness)
    harness["judge"](cases(1, 2, 3), ask)
    entries = [entry for question in ask.asked for entry in matrices(question)[1] if entry not in (-1.0, 0.0, 1.0)]
    assert len(entries) > 3000
    assert len(set(entries)) == len(entries)
    assert max(map(abs, entries)) <= 1.0


def test_the_same_seed_asks_the_same_and_inputs_of_one_call_do_not_give_away_the_next(harness):
    first, again = Scripted(harness), Scripted(harness)
    harness["judge"](cases(5), first)
    harness["judge"](cases(5), again)
    assert first.asked == again.asked
    one, other = harness["inputs"](5, 0, (9, 9, 9)), harness["inputs"](5, 1, (9, 9, 9))
    assert one != other
    assert harness["inputs"](6, 0, (9, 9, 9)) != one


def test_the_question_tells_the_inputs_and_nothing_else(harness):
    ask = Scripted(harness)
    harness["judge"](cases(9), ask)
    for question in ask.asked:
        (rows, inner, columns), _ = matrices(question)
        assert len(question) == 6 + 8 * (rows * inner + inner * columns)


# What is believed


def test_reference_and_baseline_agree_with_exact_arithmetic(harness):
    for shape in ((1, 17, 1), (7, 1, 5), (5, 11, 3), (12, 12, 12)):
        A, B = harness["inputs"](3, 0, shape)
        exact = list(itertools.chain.from_iterable(right(A, B)))
        assert harness["reference"](A, B) == pytest.approx(exact, abs=1e-15, rel=0)
        loops = list(itertools.chain.from_iterable(harness["baseline"](A, B)))
        assert loops == pytest.approx(exact, abs=1e-14, rel=0)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_is_right_through_a_real_pipe(harness, name):
    for record in judged(harness, BASELINES[name], 1, 2, 3):
        assert (record["state"], record["detail"], record["products"]) == ("right", "", 12)
        assert record["error"] < 1e-13
        assert record["speedup"] > 0


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ("C[0][0] += 1e-8", "wrong"),
        ("C[-1][-1] += 1e-8", "wrong"),
        ("C[0][0] -= 2.0", "wrong"),
        ("C[0][0] = float('nan')", "wrong"),
        ("C[-1][-1] = float('inf')", "wrong"),
        ("C[0][0] = -0.0", "wrong"),
        ("C[0][0] = str(C[0][0])", "no_product"),
        ("C[0][0] = True", "no_product"),
        ("C[0][0] = 10 ** 400", "no_product"),
        ("C[0][0] = None", "no_product"),
        ("C[0][0] = C[0][0] + 0j", "no_product"),
        ("C[0] = tuple(C[0])", "no_product"),
        ("C[0] = iter(C[0])", "no_product"),
        ("C[0].append(0.0)", "no_product"),
        ("C.append(C[0])", "no_product"),
        ("C.pop()", "no_product"),
        ("C = tuple(C)", "no_product"),
        ("C = (row for row in C)", "no_product"),
        ("C = map(list, C)", "no_product"),
        ("C = {0: C}", "no_product"),
        ("C = C[0]", "no_product"),
        ("C[0] = C", "no_product"),
        ("A[0][0] += 1.0", "changed_inputs"),
        ("A[-1].append(0.0)", "changed_inputs"),
        ("B.reverse(); B.append(B[0])", "changed_inputs"),
        ("B.clear()", "changed_inputs"),
        ("B[0] = None", "changed_inputs"),
    ],
)
def test_a_right_product_that_was_touched_is_not_right(harness, change, state):
    first, second = judged(harness, touched(change), 4, 5)
    assert first["state"] == state
    assert first["speedup"] is first["program_ms"] is None
    assert second["state"] == "not_judged"


@pytest.mark.parametrize("change", ["", "C = [list(row) for row in C]", "C = [[*row] for row in C]", "A = B = None"])
def test_a_right_product_in_new_lists_stays_right(harness, change):
    assert [record["state"] for record in judged(harness, touched(change), 4)] == ["right"]


def test_whole_numbers_count_as_numbers(harness):
    """A program that skips zeros may answer 0 where every product is zero."""
    program = """
def matmul(A, B):
    return [[sum(x * y for x, y in zip(row, column) if x and y) for column in zip(*B)] for row in A]
"""
    assert {record["state"] for record in judged(harness, program, *range(6))} == {"right"}


@pytest.mark.parametrize(
    "answered", [b"", b"\0", b"\0" + bytes(7), b"\0" + bytes(16), b"\1\xff\x1b[31m", b"\7", bytes(900)]
)
def test_bytes_that_no_harness_would_send_are_no_product(harness, answered):
    state, detail, error = harness["read"](answered, (1.0,))
    assert (state, error) == ("no_product", None)
    assert detail.isprintable()


def test_a_program_that_dies_leaves_what_was_found_so_far(harness):
    for outcome, state in (("crash", "ended"), ("timeout", "timeout"), ("memory", "ended")):
        ask = Scripted(harness)

        def dying(question, ask=ask, outcome=outcome):
            if len(ask.asked) == 5:
                raise Ended(outcome)
            return ask(question)

        dying.cpu_used = ask.cpu_used
        first, second = harness["judge"](cases(1, 2), dying)
        assert (first["state"], first["products"], first["speedup"]) == (state, 5, None)
        assert second["state"] == "not_judged"


def test_a_failure_of_the_sandbox_is_not_taken_for_the_end_of_a_program(harness):
    def ask(question):
        raise ConnectionError("the pipe broke")

    ask.cpu_used = lambda: 0.0
    with pytest.raises(ConnectionError):
        harness["judge"](cases(1), ask)


# What is timed


def test_the_speed_up_is_the_baselines_time_over_the_programs(harness):
    (record,) = harness["judge"](cases(1, smallest=16, largest=16, trials=9), Scripted(harness, during_s=0.004))
    assert record["program_ms"] == pytest.approx(4.0)
    assert record["speedup"] == pytest.approx(record["baseline_ms"] / 4.0, rel=0.5)
    (record,) = harness["judge"](cases(1, trials=1), Scripted(harness, during_s=0.004))
    assert record["speedup"] == pytest.approx(record["baseline_ms"] / record["program_ms"])


def test_work_between_an_answer_and_the_next_question_is_paid_for(harness):
    (idle,) = harness["judge"](cases(1), Scripted(harness, during_s=0.004))
    (busy,) = harness["judge"](cases(1), Scripted(harness, during_s=0.001, before_s=0.003))
    assert busy["program_ms"] == pytest.approx(idle["program_ms"])


def test_one_disturbed_trial_of_five_changes_nothing(harness):
    ask = Scripted(harness, during_s=0.002)
    calls = itertools.count()

    def disturbed(question):
        ask.clock += 5.0 if next(calls) == 11 else 0.0
        return ask(question)

    disturbed.cpu_used = ask.cpu_used
    (record,) = harness["judge"](cases(1, trials=5), disturbed)
    assert record["program_ms"] == pytest.approx(2.0)


def test_a_clock_that_stands_still_gives_a_finite_speed(harness):
    (record,) = harness["judge"](cases(1), Scripted(harness, during_s=0.0))
    assert math.isfinite(record["speedup"])


@pytest.mark.timed
def test_an_exchange_without_a_product_costs_little_beside_the_fastest_baseline(harness):
    """What both sides pay for reading inputs and writing answers, at the sizes that are timed by default."""
    A, B = harness["inputs"](1, 0, (32, 32, 32))
    asked, product = harness["question"](A, B), harness["baseline"](A, B)
    names = {}
    exec(BASELINES["four_rows"], names)

    def best(function):
        spans = []
        for _ in range(15):
            started = harness["time"].thread_time()
            harness["answer"](function, asked)
            spans.append(harness["time"].thread_time() - started)
        return min(spans)

    empty, fast = best(lambda A, B: product), best(names["matmul"])
    print(f"\nreading and writing {1e6 * empty:.0f} us of {1e6 * fast:.0f} us, {empty / fast:.0%}")
    assert empty < 0.2 * fast


def test_cpu_time_is_the_child_process_s_own(harness):
    program = "def matmul(A, B):\n    return 1\n"
    with program_process(harness, program, entry="matmul") as ask:
        before, started = ask.cpu_used(), time.thread_time()
        sum(range(10_000_000))
        assert ask.cpu_used() - before < 0.2 * (time.thread_time() - started)


# What it earns


def result(outcome=Outcome.ok, *speedups, state="right"):
    rows = tuple(
        {"seed": 1, "rows": 3, "inner": 4, "columns": 5, "products": 16, "error": 1e-16, "speedup": speedup}
        | {"program_ms": 2.0, "baseline_ms": 2.0, "state": state, "detail": ""}
        for speedup in speedups
    )
    return Result(job_id="x", outcome=outcome, detail="", cases=rows)


@pytest.mark.parametrize(
    ("speedups", "speed"),
    [
        ((1.0, 1.0), 0.0),
        ((2.0, 2.0), 2.0),
        ((4.0, 1.0), 2.0),
        ((0.5,), -2.0),
        ((0.01,), -2.0),
        ((8.0,), 6.0),
        ((99.0,), 6.0),
    ],
)
def test_speed_is_twice_the_log2_of_the_speed_up_within_bounds(speedups, speed):
    score = TASK.score(result(Outcome.ok, *speedups))
    assert score.rewards == {"works": 1.0, "no_cheating": 0.0, "correctness": 3.0, "speed": pytest.approx(speed)}
    assert score.reward == pytest.approx(4 + speed)


def test_nothing_wrong_earns_more_than_an_input_handed_back_and_the_slowest_right_one_earns_more():
    identity = TASK.score(result(Outcome.ok, None, state="wrong")).reward
    assert identity == 1.0
    assert TASK.score(result(Outcome.ok, 0.001)).reward == 2.0 > identity
    for outcome in Outcome:
        for state in ("right", "wrong", "no_product", "changed_inputs", "ended", "timeout", "not_judged"):
            if outcome is not Outcome.ok or state != "right":
                score = TASK.score(result(outcome, 8.0, state=state))
                assert score.reward <= identity, (outcome, state)
                assert score.rewards["speed"] == 0.0


def test_one_wrong_case_of_many_costs_correctness_and_speed():
    cases = (*result(Outcome.ok, 4.0, 4.0, 4.0).cases, *result(Outcome.ok, None, state="wrong").cases)
    score = TASK.score(Result(job_id="x", outcome=Outcome.ok, detail="", cases=cases))
    assert (score.rewards["correctness"], score.rewards["speed"]) == (0.0, 0.0)
    assert TASK.measure(cases) == {"mean_speedup": 0.0, "right": 0.0}


def test_a_truncated_answer_is_not_cheating():
    truncated = "<|channel|>final<|message|>```python\ndef matmul(A, B):\n    return ["
    assert TASK.extract(truncated) is None
    score = TASK.score(None)
    assert (score.outcome, score.reward, score.cases) == (Outcome.no_program, -1.0, [])
    assert score.rewards["no_cheating"] == 0.0


def test_the_detail_says_what_was_wrong_and_where(harness):
    rows = judged(harness, "def matmul(A, B):\n    return None\n", 1)
    score = TASK.score(Result(job_id="x", outcome=Outcome.ok, detail="", cases=tuple(rows)))
    shape = f"{rows[0]['rows']}x{rows[0]['inner']} times {rows[0]['inner']}x{rows[0]['columns']}"
    assert score.detail == f"{shape}: returned no list"
    assert set(score.cases[0]) == set(TASK.case_columns)
    assert TASK.describe(score.cases) == f"{shape}: no product"
    assert (
        TASK.describe(result(Outcome.ok, 1.5, 2.5).cases)
        == "32 products right, 1.50 to 2.50 times as fast as three loops"
    )


def test_the_task_validates_itself_and_training_never_meets_held_out_seeds():
    TASK.validate()
    held_out = set(TASK.held_out_seeds(256))
    assert len(held_out) == 256
    trained = [TASK.training_seeds(0, iteration, group) for iteration in range(30) for group in range(6)]
    assert all(len(seeds) == TASK.options.cases for seeds in trained)
    assert not held_out & set(itertools.chain.from_iterable(trained))


def test_a_cheat_has_no_held_out_figures_whatever_its_cases_say():
    score = TASK.score(result(Outcome.cheat, 8.0))
    assert judging.figures([score], task=TASK) == {"mean_speedup": 0.0, "right": 0.0}
    fair = TASK.score(result(Outcome.ok, 2.0, 4.0))
    assert judging.figures([fair], task=TASK) == {"mean_speedup": 3.0, "right": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": 0}, "task.cases is 0"),
        ({"trials": 0}, "task.trials is 0"),
        ({"smallest": 4}, "task.smallest is 4"),
        ({"smallest": 60, "largest": 50}, "task.largest 50"),
        ({"largest": 1000}, "task.largest 1000"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        registry.get("matmul", options)
