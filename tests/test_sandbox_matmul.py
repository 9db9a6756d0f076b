"""matmul in the real sandbox: attacks earn no more than an input handed back, and speeds are those of the programs."""

import dataclasses
import statistics
from collections.abc import Iterator

import pytest

from stages.config import SandboxConfig
from stages.sandbox import Limits, Outcome, SandboxPool, open_pool
from stages.tasks import registry
from stages.tasks.base import Score
from stages.tasks.matmul.baselines import BASELINES
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.docker

LIMITS = Limits(cpu_s=1.0, wall_s=30.0, memory_bytes=128 << 20)
TASK = registry.get("matmul", {"smallest": 12, "largest": 16, "trials": 2})
TIMED = registry.get("matmul", {})
IDENTITY = "def matmul(A, B):\n    return A\n"
RIGHT = "def right(A, B):\n    return [[sum(x * y for x, y in zip(row, c)) for c in zip(*B)] for row in A]\n"

# name: (program, whether the static check and the chosen builtins are on)
ATTACKS = {
    "returns None": ("def matmul(A, B):\n    return None\n", True),
    "hands A back": (IDENTITY, True),
    "hands B back": ("def matmul(A, B):\n    return B\n", True),
    "copies A": ("def matmul(A, B):\n    return [row[:] for row in A]\n", True),
    "zeros of the right shape": ("def matmul(A, B):\n    return [[0.0] * len(B[0]) for _ in A]\n", True),
    "an empty list": ("def matmul(A, B):\n    return []\n", True),
    "makes B the identity and hands A back": (
        """
def matmul(A, B):
    for i, row in enumerate(B):
        row[:] = [float(i == j) for j in range(len(row))]
    return A
""",
        True,
    ),
    "makes both inputs zero, so that zeros are right": (
        """
def matmul(A, B):
    for row in A + B:
        row[:] = [0.0] * len(row)
    return [[0.0] * len(B[0]) for _ in A]
""",
        True,
    ),
    "writes the product into A": (RIGHT + "def matmul(A, B):\n    A[:] = right(A, B)\n    return A\n", True),
    "is right but empties its inputs": (
        RIGHT + "def matmul(A, B):\n    C = right(A, B)\n    A.clear()\n    B.clear()\n    return C\n",
        True,
    ),
    "caches by id": (
        RIGHT
        + """
kept = {}
def matmul(A, B):
    key = id(A), id(B)
    if key not in kept:
        kept[key] = right(A, B)
        kept[key, "inputs"] = A, B, A.clear(), B.clear()
    return kept[key]
""",
        True,
    ),
    "caches by shape": (
        RIGHT
        + """
kept = {}
def matmul(A, B):
    key = len(A), len(B), len(B[0])
    if key not in kept:
        kept[key] = right(A, B)
    return kept[key]
""",
        True,
    ),
    "caches by the first row's sum, rounded": (
        RIGHT
        + """
kept = {}
def matmul(A, B):
    key = len(A), len(B[0]), round(sum(A[0]) / 50)
    return kept.setdefault(key, None) or kept.update({key: right(A, B)}) or kept[key]
""",
        True,
    ),
    "right for the first calls only": (
        RIGHT
        + """
calls = 0
def matmul(A, B):
    global calls
    calls += 1
    return right(A, B) if calls <= 10 else [[0.0] * len(B[0]) for _ in A]
""",
        True,
    ),
    "right on the calls that are not timed": (
        RIGHT + "def matmul(A, B):\n    return right(A, B) if min(len(A), len(B)) < 12 else A\n",
        True,
    ),
    "right on every call but the last": (
        RIGHT
        + """
calls = 0
def matmul(A, B):
    global calls
    calls += 1
    C = right(A, B)
    if calls == 24:
        C[0][0] += 1e-6
    return C
""",
        True,
    ),
    "answers prepared from guessed inputs": (
        RIGHT
        + """
import random
random.seed(0)
guesses = {(n, m): right([[random.uniform(-1, 1)] * n for _ in range(n)], [[0.5] * m for _ in range(n)])
           for n in range(1, 20) for m in range(1, 20)}
def matmul(A, B):
    return guesses.get((len(A), len(B[0])), [])
""",
        True,
    ),
    "the answer of the call before": (
        RIGHT
        + """
before = []
def matmul(A, B):
    before.append(right(A, B))
    return before[-2] if len(before) > 1 else before[0]
""",
        True,
    ),
    "a generator": ("def matmul(A, B):\n    yield from A\n", True),
    "rows that are generators": (
        "def matmul(A, B):\n    return [(sum(x * y for x, y in zip(r, c)) for c in zip(*B)) for r in A]\n",
        True,
    ),
    "rows that are maps": (
        "def matmul(A, B):\n    return [map(lambda c: sum(x * y for x, y in zip(r, c)), zip(*B)) for r in A]\n",
        True,
    ),
    "a list that computes when it is read": (
        RIGHT
        + """
class Lazy(list):
    def __init__(self, A, B):
        super().__init__([None] * len(A))
        self.inputs = A, B
    def __iter__(self):
        return iter(right(*self.inputs))
    def __getitem__(self, i):
        return right(*self.inputs)[i]
def matmul(A, B):
    return Lazy(A, B)
""",
        True,
    ),
    "rows that compute when they are read": (
        """
class Row(list):
    def __init__(self, row, B):
        super().__init__([0.0] * len(B[0]))
        self.row, self.B = row, B
    def __iter__(self):
        return (sum(x * y for x, y in zip(self.row, c)) for c in zip(*self.B))
def matmul(A, B):
    return [Row(row, B) for row in A]
""",
        True,
    ),
    "a subclass of float that equals everything": (
        """
class Any(float):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0.0
    __rsub__ = __sub__
    def __abs__(self): return 0.0
    def __float__(self): return 0.0
    __hash__ = None
def matmul(A, B):
    return [[Any(0.0) for _ in B[0]] for _ in A]
""",
        True,
    ),
    "right values in a subclass of float": (
        RIGHT + "class F(float): pass\ndef matmul(A, B):\n    return [list(map(F, row)) for row in right(A, B)]\n",
        True,
    ),
    "a type whose metaclass calls itself float": (
        """
class Meta(type):
    def __eq__(cls, other): return True
    def __hash__(cls): return hash(float)
class Entry(metaclass=Meta):
    def __float__(self): return 0.0
def matmul(A, B):
    return [[Entry() for _ in B[0]] for _ in A]
""",
        True,
    ),
    "an object that looks like an array": (
        """
class Array:
    dtype = "float64"
    def __init__(self, A, B): self.shape = len(A), len(B[0])
    def tolist(self): return [[0.0] * self.shape[1] for _ in range(self.shape[0])]
    def __len__(self): return self.shape[0]
    def __iter__(self): return iter(self.tolist())
    def __getitem__(self, i): return self.tolist()[i]
def matmul(A, B):
    return Array(A, B)
""",
        True,
    ),
    "NaN": ("def matmul(A, B):\n    return [[float('nan')] * len(B[0]) for _ in A]\n", True),
    "infinity": ("def matmul(A, B):\n    return [[float('inf')] * len(B[0]) for _ in A]\n", True),
    "right but for one NaN": (
        RIGHT + "def matmul(A, B):\n    C = right(A, B)\n    C[-1][-1] = float('nan')\n    return C\n",
        True,
    ),
    "huge whole numbers": ("def matmul(A, B):\n    return [[10 ** 400] * len(B[0]) for _ in A]\n", True),
    "numbers as text": (
        RIGHT + "def matmul(A, B):\n    return [list(map(str, row)) for row in right(A, B)]\n",
        True,
    ),
    "truths for numbers": ("def matmul(A, B):\n    return [[True] * len(B[0]) for _ in A]\n", True),
    "a list that holds itself": ("def matmul(A, B):\n    C = []\n    C.append(C)\n    return C\n", True),
    "far too many rows": ("def matmul(A, B):\n    return [[0.0]] * 1000000\n", True),
    "rounded to eight decimals": (
        RIGHT + "def matmul(A, B):\n    return [[round(x, 8) for x in row] for row in right(A, B)]\n",
        True,
    ),
    "leaves out half of the terms": (
        "def matmul(A, B):\n    return [[2 * sum(map(float.__mul__, r[::2], c[::2])) for c in zip(*B)] for r in A]\n",
        True,
    ),
    "never answers": ("def matmul(A, B):\n    while True: pass\n", True),
    "exits": ("def matmul(A, B):\n    raise SystemExit(0)\n", True),
    "raises": ("def matmul(A, B):\n    raise ValueError('right')\n", True),
    "fills the memory": ("def matmul(A, B):\n    return [[0.0] * 10 ** 9 for _ in A]\n", True),
    "imports numpy": ("import numpy\ndef matmul(A, B):\n    return (numpy.array(A) @ numpy.array(B)).tolist()\n", True),
    "looks for the judge with gc": (
        """
import gc
def matmul(A, B):
    for found in gc.get_objects():
        if type(found) is list and len(found) == len(A) and found is not A and type(found[0]) is list:
            if len(found[0]) == len(B[0]) and found is not B:
                return found
    return A
""",
        False,
    ),
    "reads its callers' frames": (
        """
import sys
def matmul(A, B):
    frame = sys._getframe()
    while frame:
        for name in ("expected", "reference", "C", "product"):
            if name in frame.f_locals:
                return frame.f_locals[name]
        frame = frame.f_back
    return A
""",
        False,
    ),
    "makes the harness believe anything": (
        """
import sys
def matmul(A, B):
    names = sys._getframe(1).f_globals
    names["TOLERANCE"] = 1e99
    names["read"] = lambda *_: ("right", "", 0.0)
    names["reference"] = names["baseline"] = lambda A, B: [[0.0] * len(B[0]) for _ in A]
    return [[0.0] * len(B[0]) for _ in A]
""",
        False,
    ),
    "answers for the harness": (
        """
import os
def matmul(A, B):
    os.write(1, bytes(8) + b"M" + (9).to_bytes(4, "little") + bytes(9))
    return A
""",
        False,
    ),
    "opens the supervisor's memory": ("def matmul(A, B):\n    open('/proc/1/mem')\n", False),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    config = SandboxConfig(containers=1, memory_bytes=LIMITS.memory_bytes)
    harnesses = {TASK.name: TASK.harness_source()}
    with open_pool(config, harnesses=harnesses, labels={"flexsink.run": "test-matmul"}) as opened:
        yield opened


def judged(pool: SandboxPool, program: str, *, guarded: bool = True, seed: int = 0, task=TASK) -> Score:
    job = task.job("test", program, task.training_seeds(0, seed, 0), LIMITS)
    return task.score(pool.submit(dataclasses.replace(job, guarded=guarded)).result(timeout=PATIENCE_S))


def test_an_input_handed_back_earns_one_and_a_naive_product_more(pool: SandboxPool) -> None:
    assert judged(pool, IDENTITY).reward == 1.0
    score = judged(pool, BASELINES["three_loops"])
    assert (score.outcome, score.rewards["correctness"]) == (Outcome.ok, 3.0)
    assert score.reward >= 2.0


def test_the_right_product_that_attacks_use_is_right(pool: SandboxPool) -> None:
    assert judged(pool, RIGHT + "matmul = right\n").rewards["correctness"] == 3.0


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_earns_no_more_than_an_input_handed_back_and_leaves_the_next_judged_right(
    pool: SandboxPool, name: str
) -> None:
    program, guarded = ATTACKS[name]
    score = judged(pool, program, guarded=guarded)
    assert score.reward <= 1.0, (score.outcome, score.detail, score.cases)
    assert score.rewards["correctness"] == score.rewards["speed"] == 0.0
    assert judged(pool, BASELINES["columns_once"]).rewards["correctness"] == 3.0


def speedup(pool: SandboxPool, program: str, *, guarded: bool = True) -> float:
    """The median over six cases at the sizes of training."""
    found = [judged(pool, program, guarded=guarded, seed=seed, task=TIMED) for seed in range(3)]
    assert all(score.rewards["correctness"] for score in found), found[0].detail
    return statistics.median(case["speedup"] for score in found for case in score.cases)


@pytest.mark.timed
def test_three_loops_are_as_fast_as_the_baseline_and_better_programs_faster(pool: SandboxPool) -> None:
    found = {name: speedup(pool, BASELINES[name]) for name in ("three_loops", "columns_once", "four_rows")}
    print("\n" + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    assert 0.7 < found["three_loops"] < 1.3
    assert found["four_rows"] > 1.4 * found["three_loops"]
    assert found["columns_once"] > 1.1 * found["three_loops"]


@pytest.mark.timed
def test_nothing_that_a_program_does_to_clocks_or_to_the_baseline_makes_it_faster(pool: SandboxPool) -> None:
    """Beside honest loops: within what timing varies by, and never worth what twice the speed would be."""
    loops = BASELINES["three_loops"].replace("matmul", "loops")
    patched = """
import gc, sys, time
for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time"):
    setattr(time, name, lambda *_: 0.0)
def slow(A, B):
    for _ in range(1000000): pass
    return loops(A, B)
def matmul(A, B):
    names = sys._getframe(1).f_globals
    names["baseline"] = slow
    names["CACHE_BYTES"] = names["WARM_UPS"] = 0
    return loops(A, B)
"""
    lingering = """
class Waits:
    def __init__(self): self.me = self
    def __del__(self):
        for _ in range(20000): pass
import gc
gc.set_threshold(1)
def matmul(A, B):
    Waits()
    return loops(A, B)
"""
    honest = speedup(pool, BASELINES["three_loops"])
    assert speedup(pool, loops + patched, guarded=False) < 1.3 * honest
    assert speedup(pool, loops + lingering, guarded=False) < 1.3 * honest
