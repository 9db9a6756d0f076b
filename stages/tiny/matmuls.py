"""A grammar of short matrix products for the matmul task, of graded correctness and speed.

Contract: `write(rng)` returns the text of one program that defines `matmul(A, B)`; the same rng state gives the same
text. About two in three are right: from three loops over indices (slowest) to a zip over columns turned once (fast).
The rest are wrong in ways a judge must catch: a transposed result, a missing or an extra term, rows that share one
list, one of the inputs handed back.
"""

import random
from collections.abc import Callable

WRONG = 0.34


def write(rng: random.Random) -> str:
    """Returns one program, wrong ones included."""
    return rng.choice(WRONG_WRITERS if rng.random() < WRONG else RIGHT_WRITERS)(rng)


def with_body(*lines: str) -> str:
    return "\n".join(("def matmul(A, B):", *(f"    {line}" for line in lines)))


def sizes(rng: random.Random) -> tuple[str, str, str, str]:
    """Returns the line that names rows, terms and columns, and the three names."""
    rows, terms, columns = rng.choice((("n", "m", "p"), ("n", "k", "m"), ("rows", "inner", "cols")))
    return f"{rows}, {terms}, {columns} = len(A), len(B), len(B[0])", rows, terms, columns


def three_loops(
    rng: random.Random, *, less: str = "", start: str = "0", shared: bool = False, term: str = "A[i][t] * B[t][j]"
) -> str:
    line, rows, terms, columns = sizes(rng)
    out = rng.choice(("C", "out"))
    empty = f"[[{start}] * {columns}] * {rows}" if shared else f"[[{start}] * {columns} for _ in range({rows})]"
    loops = [f"for i in range({rows}):", f"    for j in range({columns}):"]
    if rng.random() < 0.5:
        loops += [f"        for t in range({terms}{less}):", f"            {out}[i][j] += {term}"]
    else:
        loops += [
            "        s = 0",
            f"        for t in range({terms}{less}):",
            f"            s += {term}",
            f"        {out}[i][j] = s",
        ]
    return with_body(line, f"{out} = {empty}", *loops, f"return {out}")


def indexed_sum(rng: random.Random, *, less: str = "", term: str = "A[i][t] * B[t][j]") -> str:
    line, rows, terms, columns = sizes(rng)
    total = rng.choice((f"sum({term} for t in range({terms}{less}))", f"sum([{term} for t in range({terms}{less})])"))
    return with_body(line, f"return [[{total} for j in range({columns})] for i in range({rows})]")


def columns_once(rng: random.Random, *, tail: str = "", first: str = "A", second: str = "B") -> str:
    name = rng.choice(("cols", "columns", "T"))
    row, column = rng.choice((("r", "c"), ("row", "col")))
    turned = rng.choice((f"list(zip(*{second}))", f"[list({column}) for {column} in zip(*{second})]"))
    pairs = f"x * y for x, y in zip({row}, {column}){tail}"
    total = rng.choice((f"sum({pairs})", f"sum([{pairs}])"))
    return with_body(f"{name} = {turned}", f"return [[{total} for {column} in {name}] for {row} in {first}]")


def columns_each(rng: random.Random) -> str:
    row, column = rng.choice((("r", "c"), ("row", "col")))
    return with_body(f"return [[sum(x * y for x, y in zip({row}, {column})) for {column} in zip(*B)] for {row} in A]")


def rows_added(rng: random.Random, *, turned: bool = False) -> str:
    out, total = rng.choice((("C", "s"), ("out", "acc")))
    step = rng.choice(("t + x * y", "x * y + t"))
    last = f"return [list(c) for c in zip(*{out})]" if turned else f"return {out}"
    return with_body(
        f"{out} = []",
        "for row in A:",
        f"    {total} = [0] * len(B[0])",
        "    for x, b in zip(row, B):",
        f"        {total} = [{step} for t, y in zip({total}, b)]",
        f"    {out}.append({total})",
        last,
    )


def rows_in_place(rng: random.Random) -> str:
    line, rows, terms, columns = sizes(rng)
    out = rng.choice(("C", "out"))
    return with_body(
        line,
        f"{out} = [[0] * {columns} for _ in range({rows})]",
        f"for i in range({rows}):",
        f"    for t in range({terms}):",
        "        x = A[i][t]",
        f"        for j in range({columns}):",
        f"            {out}[i][j] += x * B[t][j]",
        f"return {out}",
    )


def mapped(rng: random.Random) -> str:
    name = rng.choice(("cols", "columns", "T"))
    return with_body(
        f"{name} = list(zip(*B))",
        "mul = float.__mul__" if rng.random() < 0.3 else "mul = lambda x, y: x * y",
        f"return [[sum(map(mul, r, c)) for c in {name}] for r in A]",
    )


def handed_back(rng: random.Random) -> str:
    return with_body(
        rng.choice(("return A", "return B", "return [r[:] for r in A]", "return [[0] * len(B[0]) for _ in A]"))
    )


def cell_by_cell(rng: random.Random) -> str:
    row, other = rng.choice((("r", "s"), ("a", "b")))
    return with_body(f"return [[x * y for x, y in zip({row}, {other})] for {row}, {other} in zip(A, B)]")


RIGHT_WRITERS: tuple[Callable[[random.Random], str], ...] = (
    three_loops,
    indexed_sum,
    columns_once,
    columns_once,
    columns_each,
    rows_added,
    rows_in_place,
    mapped,
)
WRONG_WRITERS: tuple[Callable[[random.Random], str], ...] = (
    lambda rng: three_loops(rng, less=" - 1"),
    lambda rng: three_loops(rng, start="1"),
    lambda rng: three_loops(rng, shared=True),
    lambda rng: three_loops(rng, term="A[i][t] * B[j][t]"),
    lambda rng: indexed_sum(rng, less=" - 1"),
    lambda rng: indexed_sum(rng, term="A[i][t] + B[t][j]"),
    lambda rng: columns_once(rng, tail=" if x"),
    lambda rng: columns_once(rng, first="B", second="A"),
    lambda rng: rows_added(rng, turned=True),
    handed_back,
    cell_by_cell,
)
