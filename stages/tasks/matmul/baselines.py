"""Functions to compare with, as program texts under the model's own contract: they are judged as its answers are.

three_loops is what speed-up 1 means; indexed_sum sums over an index; columns_each turns B anew for every row;
columns_once turns it once; rows_added adds multiples of B's rows and never turns it; four_rows adds four at a time.
"""

THREE_LOOPS = """\
def matmul(A, B):
    rows, inner, columns = len(A), len(B), len(B[0])
    C = [[0.0] * columns for _ in range(rows)]
    for i in range(rows):
        for j in range(columns):
            for k in range(inner):
                C[i][j] += A[i][k] * B[k][j]
    return C
"""

INDEXED_SUM = """\
def matmul(A, B):
    rows, inner, columns = len(A), len(B), len(B[0])
    return [[sum(A[i][k] * B[k][j] for k in range(inner)) for j in range(columns)] for i in range(rows)]
"""

COLUMNS_EACH = """\
def matmul(A, B):
    return [[sum(x * y for x, y in zip(row, column)) for column in zip(*B)] for row in A]
"""

COLUMNS_ONCE = """\
def matmul(A, B):
    columns = list(zip(*B))
    return [[sum([x * y for x, y in zip(row, column)]) for column in columns] for row in A]
"""

ROWS_ADDED = """\
def matmul(A, B):
    C = []
    for row in A:
        total = [0.0] * len(B[0])
        for x, other in zip(row, B):
            total = [t + x * y for t, y in zip(total, other)]
        C.append(total)
    return C
"""

FOUR_ROWS = """\
def matmul(A, B):
    whole = len(B) - len(B) % 4
    blocks = [list(zip(*B[k : k + 4])) for k in range(0, whole, 4)]
    C = []
    for row in A:
        total = [0.0] * len(B[0])
        for k, block in enumerate(blocks):
            a, b, c, d = row[4 * k : 4 * k + 4]
            total = [t + a * w + b * x + c * y + d * z for t, (w, x, y, z) in zip(total, block)]
        for x, other in zip(row[whole:], B[whole:]):
            total = [t + x * y for t, y in zip(total, other)]
        C.append(total)
    return C
"""

BASELINES = {
    "three_loops": THREE_LOOPS,
    "indexed_sum": INDEXED_SUM,
    "columns_each": COLUMNS_EACH,
    "columns_once": COLUMNS_ONCE,
    "rows_added": ROWS_ADDED,
    "four_rows": FOUR_ROWS,
}
