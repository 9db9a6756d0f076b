"""What a program may keep from one call to the next, read off its syntax tree: reported, never refused.

A table computed when the program is loaded, a constant or a helper is no state. State is what a function that the entry
function can reach changes and that outlives the call: a global, an object made at module level, a mutable default, an
attribute of a function, class or instance made at module level, a closure's variable, a cache of results, a generator
that is drawn from. Each is named with its line.

What it cannot see: a change through another name for the same object (`m = MEMO; m[k] = v`). What the program's answers
say about state is asked by the harness's probe; this pass says where to look.
"""

import ast
import json
from collections.abc import Iterator
from typing import NamedTuple

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
CHANGE_WORDS = """
    append appendleft add update pop popleft popitem extend extendleft insert remove clear setdefault discard sort
    reverse rotate push send subtract difference_update intersection_update symmetric_difference_update move_to_end
"""
CHANGES = frozenset(CHANGE_WORDS.split())
DRAWN_FROM = frozenset({"next", "heappush", "heappop", "heapify", "heapreplace", "heappushpop", "shuffle", "setattr"})
AT_LOADING = frozenset({"__init_subclass__", "__set_name__"})  # methods that run when a class is made
CACHES = frozenset({"lru_cache", "cache"})
MAX_NAMED = 4
MODULE = "a module-level object"


class Scope(NamedTuple):
    """One function, class or the module, with the names that it binds."""

    node: ast.AST
    nodes: list[ast.AST]
    bound: frozenset[str]
    globals: frozenset[str]
    nonlocals: frozenset[str]


def children(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes right below, but for contexts and operators: half the time of ast.iter_child_nodes."""
    for name in node._fields:
        value = getattr(node, name, None)
        if type(value) is list:
            for each in value:
                if isinstance(each, ast.AST):
                    yield each
        elif isinstance(value, ast.AST) and value._fields:
            yield value


def own_nodes(node: ast.AST) -> list[ast.AST]:
    """Returns the nodes of a scope's body, functions and classes inside it as single nodes."""
    return nodes_in(node.body if isinstance(node.body, list) else [node.body])  # type: ignore[attr-defined]


def nodes_in(start: list[ast.AST]) -> list[ast.AST]:
    nodes = list(start)
    for node in nodes:  # which grows meanwhile
        if isinstance(node, Function):
            nodes += [*node.args.defaults, *(each for each in node.args.kw_defaults if each)]
            nodes += getattr(node, "decorator_list", ())
        elif isinstance(node, ast.ClassDef):
            nodes += [*node.bases, *node.decorator_list]
        else:
            nodes += children(node)
    return nodes


def every_node(node: ast.AST) -> list[ast.AST]:
    nodes = [node]
    for each in nodes:
        nodes += children(each)
    return nodes


def scope_of(node: ast.AST) -> Scope:
    bound: set[str] = set()
    declared: dict[type, set[str]] = {ast.Global: set(), ast.Nonlocal: set()}
    if isinstance(node, Function):
        bound.update(parameters(node))
    nodes = own_nodes(node)
    for inner in nodes:
        match inner:
            case ast.Name(id=name, ctx=ctx):
                if not isinstance(ctx, ast.Load):
                    bound.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                bound.add(name)
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                bound.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                bound.update((alias.asname or alias.name).partition(".")[0] for alias in names)
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                declared[type(inner)].update(names)
    bound -= declared[ast.Global] | declared[ast.Nonlocal]
    return Scope(node, nodes, frozenset(bound), frozenset(declared[ast.Global]), frozenset(declared[ast.Nonlocal]))


def parameters(node: Function) -> list[str]:
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [each.arg for each in every if each is not None]


def mutable_defaults(node: Function) -> set[str]:
    """Returns the parameters whose default is an object that could be changed."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    pairs = [*zip(reversed(positional), reversed(arguments.defaults), strict=False)]
    pairs += [(each, default) for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    fixed = ast.Constant | ast.UnaryOp | ast.BinOp | ast.Tuple | ast.Lambda | ast.Name | ast.Attribute
    return {each.arg for each, default in pairs if default is not None and not isinstance(default, fixed)}


def root_of(node: ast.AST) -> str:
    """Returns the name that an attribute, an item or a method's result hangs on; "" where it hangs on none."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred | ast.Call):
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Attribute):
                return ""  # something new, for all that can be seen
            node = node.func
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def loaded(node: ast.AST) -> set[str]:
    return {each.id for each in every_node(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)}


def called(node: ast.AST) -> set[str]:
    return {each.func.id for each in every_node(node) if isinstance(each, ast.Call) and isinstance(each.func, ast.Name)}


def last_name(node: ast.AST) -> str:
    """Returns lru_cache for lru_cache, functools.lru_cache and both of them called."""
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


class Reader:
    """Reads one program; `found` has what it keeps as keys (line, words)."""

    def __init__(self, tree: ast.Module, entry: str) -> None:
        self.module = scope_of(tree)
        self.imported = {
            (alias.asname or alias.name).partition(".")[0]
            for node in self.module.nodes
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        self.definitions: dict[str, list[ast.AST]] = {}
        for node in self.module.nodes:
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    self.definitions.setdefault(name, []).append(node)
                case ast.Assign(value=value, targets=targets):
                    for target in targets:
                        for name in (each.id for each in ast.walk(target) if isinstance(each, ast.Name)):
                            self.definitions.setdefault(name, []).append(value)
                case (
                    ast.AnnAssign(target=ast.Name(id=name), value=value)
                    | ast.NamedExpr(target=ast.Name(id=name), value=value)
                ) if value is not None:
                    self.definitions.setdefault(name, []).append(value)
        self.entry = entry
        self.reachable = self.reach(entry)
        self.made = self.makers()
        self.found: dict[tuple[int, str], None] = {}
        for name in sorted(self.reachable):
            for node in self.definitions[name]:
                self.read_definition(node)

    def reach(self, entry: str) -> set[str]:
        """Returns the module's names that the entry function may come to use."""
        reached: set[str] = set()
        waiting = [entry]
        while waiting:
            name = waiting.pop()
            if name in self.definitions and name not in reached:
                reached.add(name)
                for node in self.definitions[name]:
                    waiting.extend(loaded(node))
        return reached

    def makers(self) -> set[str]:
        """Returns the functions and classes called at module level for something that the entry function can reach."""
        made: set[str] = set()
        for name in self.reachable:
            for node in self.definitions[name]:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    made.update(last_name(each) for each in node.decorator_list)
                    if isinstance(node, ast.ClassDef):
                        made.update(*(called(each.value) for each in node.body if isinstance(each, ast.Assign)))
                elif not isinstance(node, ast.Lambda):
                    made |= called(node)
        return made

    def report(self, node: ast.AST, words: str) -> None:
        self.found.setdefault((getattr(node, "lineno", 1), words))

    def read_definition(self, node: ast.AST) -> None:
        """Reads a function or class of the module, or the functions inside a value that is kept there."""
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self.read_caches(node)
                self.read_function(node, [self.module])
            case ast.ClassDef(name=name):
                for inner in own_nodes(node):
                    if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and inner.name not in AT_LOADING:
                        self.read_caches(inner)
                        self.read_function(inner, [self.module], kept_self=name in self.made)
            case _:
                for inner in nodes_in([node]):
                    if isinstance(inner, ast.Lambda):
                        self.read_function(inner, [self.module])
                    elif isinstance(inner, ast.Name | ast.Attribute) and last_name(inner) in CACHES:
                        self.report(inner, "keeps results in a cache")

    def read_caches(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for decorator in node.decorator_list:
            if last_name(decorator) in CACHES:
                self.report(decorator, f"keeps results of {node.name} in a cache")

    def read_function(self, node: Function, outer: list[Scope], *, kept_self: bool = False) -> None:
        scopes = [*outer, scope_of(node)]
        names = parameters(node)
        self_name = names[0] if kept_self and names and getattr(node, "name", "") != "__init__" else ""
        for inner in scopes[-1].nodes:
            match inner:
                case ast.Name(id=name, ctx=ast.Store() | ast.Del()) if name not in scopes[-1].bound:
                    where = self.kept(name, scopes)
                    if where:
                        self.report(inner, f"writes {'global ' if where == MODULE else ''}{name}")
                case (
                    ast.Attribute(value=target, ctx=ast.Store() | ast.Del())
                    | ast.Subscript(value=target, ctx=ast.Store() | ast.Del())
                    | ast.Call(func=ast.Attribute(value=target, attr=_))
                ) if not isinstance(inner, ast.Call) or (
                    inner.func.attr in CHANGES  # type: ignore[attr-defined]
                    and root_of(target) not in self.imported
                ):
                    self.changed(inner, root_of(target), scopes, self_name)
                case ast.Call(func=function, args=[first, *_]) if last_name(function) in DRAWN_FROM and not isinstance(
                    first, ast.Call
                ):
                    self.changed(inner, root_of(first), scopes, self_name)
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                    self.read_function(inner, scopes)
                case ast.ClassDef():
                    for method in own_nodes(inner):
                        if isinstance(method, Function):
                            self.read_function(method, scopes)

    def changed(self, node: ast.AST, name: str, scopes: list[Scope], self_name: str) -> None:
        """Notes a change of what `name` stands for, where that outlives the call."""
        if name and name == self_name:
            self.report(node, f"changes {name}, of a class instantiated at module level")
        elif name and (where := self.kept(name, scopes)):
            self.report(node, f"changes {name}, {where}")

    def kept(self, name: str, scopes: list[Scope]) -> str:
        """Returns what keeps `name` alive between calls; "" where it is made anew in each, or is a builtin."""
        if name in scopes[-1].globals:
            return MODULE
        for depth in range(len(scopes) - 1, 0, -1):
            scope = scopes[depth]
            if name in scope.bound:
                if isinstance(scope.node, Function) and name in mutable_defaults(scope.node):
                    return "a mutable default" if depth == 1 else ""
                maker = getattr(scopes[1].node, "name", "")
                closed_over = depth < len(scopes) - 1 and maker in self.made and maker != self.entry
                return f"a variable that a result of {maker}() keeps" if closed_over else ""
        if name not in self.module.bound:
            return ""
        return "an imported module" if name in self.imported else MODULE

    def reads_argument(self) -> bool | None:
        """Says whether the entry function ever looks at an argument; None where that cannot be seen."""
        definitions = self.definitions.get(self.entry, [])
        if len(definitions) != 1 or not isinstance(definitions[0], Function):
            return None
        node = definitions[0]
        if node.args.vararg or node.args.kwarg or getattr(node, "decorator_list", None):
            return None
        body = node.body if isinstance(node.body, list) else [node.body]
        used = set().union(*(loaded(each) for each in body))
        return bool(used & {*parameters(node)})


def notes(tree: ast.Module, entry: str) -> str:
    """Returns what the score's columns say of a program before it runs, as JSON in one line of ASCII.

    Example: {"reads_argument": true, "state": "line 4: writes global calls"}; "" where the tree is too deep to be read.
    """
    try:
        reader = Reader(tree, entry)
    except RecursionError:  # functions nested by the thousand
        return ""
    lines = [f"line {line}: {words}" for line, words in sorted(reader.found)]
    if len(lines) > MAX_NAMED:
        lines[MAX_NAMED:] = [f"and {len(lines) - MAX_NAMED} more"]
    return json.dumps({"reads_argument": reader.reads_argument(), "state": "; ".join(lines)})
