"""Both ends of the pipe between the supervisor, which holds the inputs and times the calls, and the program's process.

A message is one call:
    question: rows, inner, columns (2 bytes each), then A and B as float64, row by row
    answer:   one byte, 0 and then the product as float64, or one of NOT_A_PRODUCT and why in words
A case is a list of small products of odd shapes, and then one product that is timed over several trials. Every call
gets inputs drawn for it alone, and every answer is compared with a reference that is computed here: a program that
caches, answers what it was not asked yet, or is right on the first calls only, is wrong.

What is timed is CPU time, which a busy machine disturbs less than the clock on the wall. A call costs what the
program's process used from the end of the last answer to the end of this one: reading the inputs, computing, writing
the answer, and whatever it did in between, so that work put off or done ahead is paid for. The baseline runs in the
supervisor's process by turns with it, on the same CPU and inputs and through the same `answer`; no program can touch
it. Reading and writing, a twentieth of the three loops' time at the default sizes, counts on both sides. Before each
trial more memory than the CPU's caches hold is overwritten, and in every other trial the baseline is first.

The sandbox ships this file as it is and runs `judge` in the supervisor, `serve` in the program's process.
"""

import itertools
import math
import operator
import random
import statistics
import struct
import time

MEASURES_SPEED = True  # read by the supervisor, which then keeps itself and the program on one CPU
TOLERANCE = 1e-9  # absolute; entries are in [-1, 1], so honest sums of 64 terms in any order are within 1e-13
LARGEST_INT = 1 << 53
SHAPE = struct.Struct("<HHH")
NOT_A_PRODUCT = {1: "no_product", 2: "changed_inputs"}
WARM_UPS = 1  # calls of the timed shape before the trials: the process gets its memory, the interpreter adapts
CACHE_BYTES = 36 << 20  # read or overwritten in a pass; a server's L3 cache is 16 to 36 MiB


def baseline(A, B):  # type: ignore[no-untyped-def]
    """The product by three loops over indices: speed-up 1."""
    rows, inner, columns = len(A), len(B), len(B[0])
    C = [[0.0] * columns for _ in range(rows)]
    for i in range(rows):
        for j in range(columns):
            for k in range(inner):
                C[i][j] += A[i][k] * B[k][j]
    return C


def reference(A, B):  # type: ignore[no-untyped-def]
    """Returns the product row by row, each entry the float64 nearest to the sum of its rounded products."""
    columns = list(zip(*B, strict=True))
    return [math.fsum(map(operator.mul, row, column)) for row in A for column in columns]


def odd_shapes(draw):  # type: ignore[no-untyped-def]
    """Returns (rows, inner, columns) of the products that are checked only: rows, columns, one cell, primes."""
    n, m = draw.randint(4, 16), draw.randint(3, 12)
    primes = draw.sample((2, 3, 5, 7, 11, 13), 3)
    shapes = [
        (1, n, 1),
        (n, 1, m),
        (1, 1, 1),
        (1, n, m),
        (n, m, 1),
        tuple(primes),
        (n, n, n),
        (2, draw.randint(17, 29), 3),
        (draw.randint(17, 29), 3, 2),
    ]
    draw.shuffle(shapes)
    return shapes


def inputs(seed, call, shape, *, plain=False):  # type: ignore[no-untyped-def]
    """Returns A and B, drawn by a generator of their own: what earlier calls drew does not tell it.

    plain: entries are whole numbers and zeros in about one matrix of two.
    """
    draw = random.Random(f"{seed} {call}")
    rows, inner, columns = shape

    def matrix(height, width):  # type: ignore[no-untyped-def]
        if plain and draw.random() < 0.5:
            return [[float(draw.randint(-1, 1)) for _ in range(width)] for _ in range(height)]
        return [[draw.uniform(-1.0, 1.0) for _ in range(width)] for _ in range(height)]

    return matrix(rows, inner), matrix(inner, columns)


def question(A, B):  # type: ignore[no-untyped-def]
    flat = [*itertools.chain.from_iterable(A), *itertools.chain.from_iterable(B)]
    return SHAPE.pack(len(A), len(B), len(B[0])) + struct.pack(f"<{len(flat)}d", *flat)


def answer(function, asked):  # type: ignore[no-untyped-def]
    """Returns the answer to a question: what `function(A, B)` returns, or why that is no matrix of numbers."""
    rows, inner, columns = SHAPE.unpack_from(asked)
    split = rows * inner
    entries = struct.unpack_from(f"<{split + inner * columns}d", asked, SHAPE.size)
    A = [list(entries[start : start + inner]) for start in range(0, split, inner)]
    B = [list(entries[start : start + columns]) for start in range(split, len(entries), columns)]
    product = function(A, B)
    # Exact types only, so that nothing below calls a method of the program's.
    if type(product) is not list:
        return b"\1returned no list"
    if len(product) != rows:
        return b"\1returned %d rows, not %d" % (len(product), rows)
    flat = []
    for row in product:
        if type(row) is not list or len(row) != columns:
            return b"\1returned a row that is no list of %d numbers" % columns
        flat += row
    others = [entry for entry in flat if type(entry) is not float]
    if others:
        if not all([type(entry) is int for entry in others]):
            return b"\1returned an entry that is no number"
        if max(map(abs, others)) > LARGEST_INT:
            return b"\1returned a whole number that is no float"
    packed = struct.pack(f"<{len(flat)}d", *flat)
    after = []
    for row in [*A, *B] if len(A) == rows and len(B) == inner else ():
        if type(row) is list:
            after += row
    if len(after) != len(entries) or not all(map(operator.is_, after, entries)):
        return b"\2changed A or B"
    return b"\0" + packed


def serve(function, receive, send):  # type: ignore[no-untyped-def]
    """Answers questions until there are none; the program's exceptions go to the sandbox."""
    while asked := receive():
        send(answer(function, asked))


def read(answered, expected):  # type: ignore[no-untyped-def]
    """Returns (state, detail, largest absolute error); state: right, wrong or one of NOT_A_PRODUCT."""
    kind = answered[0] if answered else 1
    if kind or len(answered) != 1 + 8 * len(expected):
        detail = "".join(
            letter if letter.isprintable() else " " for letter in answered[1:120].decode("utf-8", "replace")
        )
        return NOT_A_PRODUCT.get(kind, "no_product"), detail, None
    errors = list(map(abs, map(operator.sub, struct.unpack_from(f"<{len(expected)}d", answered, 1), expected)))
    if not all(map(math.isfinite, errors)):
        return "wrong", "an entry is not finite", None
    worst = max(errors)
    return ("wrong", "", worst) if worst > TOLERANCE else ("right", "", worst)


class Caches:
    """Overwrites more memory than the CPU's caches hold."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def overwrite(self) -> None:
        self.buffer = self.buffer or bytearray(CACHE_BYTES)
        half = CACHE_BYTES // 2
        with memoryview(self.buffer) as view:
            view[:half] = view[half:]


def judge(cases, ask):  # type: ignore[no-untyped-def]
    """Returns a record for each case; once an answer is wrong, the others are left out as `not_judged`.

    cases: dicts with seed, smallest and largest (limits of the timed sizes) and trials. ask(question) -> answer raises
    an exception with `outcome` when the program ended; ask.cpu_used() is the CPU time of its process in seconds.
    """
    caches = Caches()
    records = []
    over = False
    for case in cases:
        record = {
            "seed": case["seed"],
            "rows": None,
            "inner": None,
            "columns": None,
            "products": 0,
            "error": None,
            "speedup": None,
            "program_ms": None,
            "baseline_ms": None,
            "state": "not_judged",
            "detail": "",
        }
        records.append(record)
        if over:
            continue
        try:
            play(case, ask, record, caches)
        except Exception as ended:
            outcome = getattr(ended, "outcome", None)
            if outcome is None:
                raise
            record["state"] = "timeout" if outcome == "timeout" else "ended"
        over = record["state"] != "right"
    return records


def play(case, ask, record, caches):  # type: ignore[no-untyped-def]
    """Fills the record of one case in; what stands in it when the program ends is what was found so far."""
    draw = random.Random(case["seed"])
    checked = odd_shapes(draw)
    timed = tuple(draw.randint(case["smallest"], case["largest"]) for _ in range(3))
    trials = []
    mark = ask.cpu_used()
    for call, shape in enumerate([*checked, *[timed] * (WARM_UPS + case["trials"])]):
        A, B = inputs(case["seed"], call, shape, plain=call < len(checked))
        asked = question(A, B)
        record["rows"], record["inner"], record["columns"] = shape
        expected, baseline_s = (), 0.0
        if call < len(checked):
            expected = reference(A, B)
        else:
            caches.overwrite()
            if call % 2:
                expected, baseline_s = run_baseline(asked, shape)
        answered = ask(asked)
        now = ask.cpu_used()
        used_s, mark = now - mark, now
        if not expected:
            expected, baseline_s = run_baseline(asked, shape)
        state, detail, error = read(answered, expected)
        record["products"] += 1
        if error is not None:
            record["error"] = max(error, record["error"] or 0.0)
        if state != "right":
            record["state"], record["detail"] = state, detail
            return
        if call >= len(checked) + WARM_UPS:
            trials.append((baseline_s, used_s))
    record["state"] = "right"
    record["speedup"] = statistics.median(base / max(used, 1e-6) for base, used in trials)
    record["baseline_ms"] = 1e3 * statistics.median(base for base, _ in trials)
    record["program_ms"] = 1e3 * statistics.median(used for _, used in trials)


def run_baseline(asked, shape):  # type: ignore[no-untyped-def]
    """Returns the product by three loops, entry by entry, and the CPU seconds it took."""
    started = time.thread_time()
    answered = answer(baseline, asked)
    seconds = time.thread_time() - started
    return struct.unpack_from(f"<{shape[0] * shape[2]}d", answered, 1), seconds
