"""Which family a 2048 strategy belongs to, told from its syntax tree alone, whoever wrote it.

Contract: `family(program)` returns one of strategies.FAMILIES, or None for a program that does not parse, lacks
strategy(board) or shows none of the marks below. Names play no part. In order:

    snake       tiles are weighed by a table of numbers for positions, at least eight of them
    look_ahead  a tile is doubled: the program makes moves itself
    greedy      equal neighbours are summed up
    corner      strategy itself names two neighbouring directions together
    random      a function of the module random is called
    fixed       four letters in a row
"""

import ast

LETTERS = frozenset("WASD")
NEIGHBOURS = frozenset(map(frozenset, ("WA", "WD", "SA", "SD")))


def entry(tree: ast.Module, name: str, arguments: int) -> ast.FunctionDef | None:
    """Returns the function of that name at the top level when it takes that many arguments."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name and len(node.args.args) == arguments:
            return node
    return None


def parses(program: str, name: str, arguments: int) -> bool:
    """Returns whether the program parses and defines a function of that name and number of arguments."""
    try:
        return entry(ast.parse(program), name, arguments) is not None
    except (SyntaxError, ValueError):
        return False


def family(program: str) -> str | None:
    """Returns the family of a program that defines strategy(board)."""
    if not parses(program, "strategy", 1):
        return None
    tree = ast.parse(program)
    strategy = entry(tree, "strategy", 1)
    assert strategy is not None
    nodes = list(ast.walk(tree))
    if any(isinstance(node, ast.List) and numbers(node) >= 8 for node in nodes):
        return "snake"
    if any(map(doubles, nodes)):
        return "look_ahead"
    if any(map(sums_equal, nodes)):
        return "greedy"
    texts = [
        node.value for node in ast.walk(strategy) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    if any(len(text) == 2 and frozenset(text) in NEIGHBOURS for text in texts):
        return "corner"
    if any(map(draws, nodes)):
        return "random"
    letters = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    if any(frozenset(text) == LETTERS for text in letters) or set(letters) >= LETTERS:
        return "fixed"
    return None


def numbers(table: ast.List) -> int:
    """Returns how many numbers are written in a list."""
    return sum(isinstance(node, ast.Constant) and isinstance(node.value, int) for node in ast.walk(table))


def is_two(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == 2


def doubles(node: ast.AST) -> bool:
    """Returns whether the node multiplies something by 2, other than two numbers."""
    if isinstance(node, ast.AugAssign):
        return isinstance(node.op, ast.Mult) and is_two(node.value)
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        return False
    return any(
        is_two(one) and isinstance(other, ast.Subscript)
        for one, other in ((node.left, node.right), (node.right, node.left))
    )


def sums_equal(node: ast.AST) -> bool:
    """Returns whether the node sums comparisons for equality."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "sum"):
        return False
    return any(isinstance(part, ast.Compare) and isinstance(part.ops[0], ast.Eq) for part in ast.walk(node))


def draws(node: ast.AST) -> bool:
    """Returns whether the node calls something of the module random."""
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    if isinstance(called, ast.Attribute):
        return isinstance(called.value, ast.Name) and called.value.id == "random"
    return isinstance(called, ast.Name) and called.id == "choice"


def syntax_tree(program: str | None) -> str | None:
    """Returns the program's syntax tree without positions, or None where it does not parse."""
    if program is None:
        return None
    try:
        return ast.dump(ast.parse(program))
    except (SyntaxError, ValueError):
        return None
