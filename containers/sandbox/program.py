"""What a program may say: the static check before it runs, and the names it runs with.

This is the outer layer. It names what a program did wrong and where, so that its score can be explained; it is not what
keeps a program in. A program that gets past it has the whole interpreter, and then faces another uid, the limits and
the system call filter of case.py.

Refused: imports of anything but ALLOWED_IMPORTS, dynamic imports (__import__, eval, exec, compile), names and
attributes that lead from an object into the interpreter (dunders but the usual methods; frames, code, globals). Never
refused: constants, helpers, tables computed when the program is loaded, and state kept between calls; that is reported
by state.py, since a cache or a counter can be honest and only its effect says whether it is.
"""

import __future__  # noqa: F401  (kept for programs that import it)

import ast
import builtins
import collections.abc
import copy
import functools
import heapq
import itertools
import math
import random
import re
import sys
import types
import typing

import state

ALLOWED_IMPORTS = ("math", "random", "itertools", "collections", "functools", "heapq", "copy", "typing")
PRELOADED = {
    "math": math,
    "random": random,
    "itertools": itertools,
    "collections": collections,
    "collections.abc": collections.abc,
    "functools": functools,
    "heapq": heapq,
    "copy": copy,
    "typing": typing,
}
WITHHELD = {"typing": {"get_type_hints", "ForwardRef"}}  # evaluate strings with all builtins
METHOD_WORDS = """
    init new call repr str bool hash len iter next reversed contains getitem setitem delitem missing enter
    exit getattr setattr delattr del class_getitem init_subclass set_name length_hint lt le eq ne gt ge add
    sub mul truediv floordiv mod divmod pow lshift rshift and or xor matmul neg pos abs invert radd rsub rmul
    rtruediv rfloordiv rmod rdivmod rpow rlshift rrshift rand ror rxor rmatmul iadd isub imul itruediv
    ifloordiv imod ipow ilshift irshift iand ior ixor imatmul int float index round floor ceil trunc copy
    deepcopy format post_init
"""
METHODS = frozenset(f"__{word}__" for word in METHOD_WORDS.split())
READABLE = METHODS | {"__name__", "__doc__"}
SLOTS = frozenset({"__slots__", "__name__", "__doc__", "__all__", "__version__", "__author__"})
FRAME_WORDS = """
    gi_frame gi_code gi_yieldfrom cr_frame cr_code cr_await cr_origin ag_frame ag_code ag_await tb_frame
    tb_next tb_lasti f_back f_builtins f_code f_globals f_locals f_trace co_code co_consts co_names
    func_globals func_code mro _evaluate
"""
FRAME_ATTRIBUTES = frozenset(FRAME_WORDS.split())
ESCAPES = frozenset({"eval", "exec", "compile", "open", "globals", "locals", "vars", "breakpoint"})
OFFERED_WORDS = """
    abs all any ascii bin bool bytearray bytes callable chr classmethod complex dict divmod enumerate filter
    float format frozenset hash hex id int isinstance issubclass iter len list map max memoryview min next
    object oct ord pow property range repr reversed round set slice sorted staticmethod str sum super tuple
    type zip Ellipsis NotImplemented
"""


SOURCE_LINE = re.compile(r"\r\n|\r|\n")  # as the tokenizer ends lines; str.splitlines knows more ends
MAX_QUOTE = 80


class Program(typing.NamedTuple):
    """A program that may run: its code, and notes on it in one line of JSON (state.py), "" for an unguarded one."""

    code: types.CodeType
    notes: str


class Refused(Exception):
    """A program that is not run: outcome (syntax_error, foreign_import or cheat) and what was found where."""

    def __init__(self, outcome: str, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome
        self.detail = detail


def is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def is_hidden(name: str) -> bool:
    """Says whether no program may read an attribute of this name."""
    return (is_dunder(name) and name not in READABLE) or name in FRAME_ATTRIBUTES


def compile_checked(source: str, *, entry: str, guarded: bool) -> Program:
    """Returns the program's code and notes.

    Refused when it does not parse, imports what it may not, or reaches for the interpreter.
    """
    try:
        tree = ast.parse(source, "<program>")
        findings = find(tree) if guarded else []
        code = compile(tree, "<program>", "exec", dont_inherit=True)
    except SyntaxError as error:
        raise Refused("syntax_error", f"{error.msg} (line {error.lineno})") from None
    except (ValueError, RecursionError) as error:  # null bytes, lone surrogates; nested too deeply
        raise Refused("syntax_error", f"{type(error).__name__}: {error}") from None
    if findings:
        line, outcome, what = min(findings)
        others = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise Refused(outcome, f"line {line}: {what}: {quoted(source, line)}{others}")
    return Program(code, state.notes(tree, entry) if guarded else "")


def quoted(source: str, line: int) -> str:
    """Returns the line of the source, cut to MAX_QUOTE characters."""
    text = SOURCE_LINE.split(source)[line - 1].strip()
    return text if len(text) <= MAX_QUOTE else text[: MAX_QUOTE - 3] + "..."


def running_line() -> str:
    """Returns "line 3: " for the line of the program that is running, "" where none is."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != "<program>":
        frame = frame.f_back  # type: ignore[assignment]
    return f"line {frame.f_lineno}: " if frame is not None else ""


def find(tree: ast.AST) -> list[tuple[int, str, str]]:
    """Returns what the program must not do, each as (line, outcome, words)."""
    nodes = state.every_node(tree)
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    findings: list[tuple[int, str, str]] = []
    line = 1
    for node in nodes:
        line = getattr(node, "lineno", line)
        match node:
            case ast.Import(names=names):
                for alias in names:
                    if alias.name not in PRELOADED:
                        findings.append((line, "foreign_import", f"imports {alias.name}"))
            case ast.ImportFrom(module=module, names=names, level=level):
                if module == "__future__" and not level:
                    continue
                if level or module not in PRELOADED:
                    findings.append((line, "foreign_import", f"imports from {'.' * level}{module or ''}"))
                for alias in names:
                    if is_dunder(alias.name):
                        findings.append((line, "cheat", f"imports {alias.name}"))
            case ast.Attribute(attr=name):
                if (is_dunder(name) and name not in READABLE) or name in FRAME_ATTRIBUTES:
                    findings.append((line, "cheat", f"reaches for .{name}"))
            case ast.Name(id=name, ctx=ctx):
                if (
                    name in METHODS
                    or name == "__name__"
                    or (is_dunder(name) and isinstance(ctx, ast.Store) and name in SLOTS)
                ):
                    continue
                if is_dunder(name):
                    findings.append((line, "cheat", f"uses {name}"))
                elif name in ESCAPES and name not in bound:
                    findings.append((line, "cheat", f"uses {name}()"))
            case ast.MatchClass(kwd_attrs=names):
                for name in names:
                    if is_dunder(name) or name in FRAME_ATTRIBUTES:
                        findings.append((line, "cheat", f"matches {name}"))
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                if is_dunder(name) and name not in METHODS:
                    findings.append((line, "cheat", f"defines {name}"))
            case (
                ast.arg(arg=name)
                | ast.keyword(arg=str(name))
                | ast.alias(asname=str(name))
                | ast.ExceptHandler(name=str(name))
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
                | ast.MatchMapping(rest=str(name))
            ):
                if is_dunder(name):
                    findings.append((line, "cheat", f"names {name}"))
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                for name in names:
                    if is_dunder(name):
                        findings.append((line, "cheat", f"declares {name}"))
            case _:
                pass
    return findings


class SeededRandom(random.Random):
    """A Random that never asks the system: unseeded, it starts from the module's own; moves can be repeated."""

    def seed(self, a: object = None, version: int = 2) -> None:
        super().seed(random.getrandbits(64) if a is None else a, version)  # type: ignore[arg-type]


def seed_random() -> None:
    """Makes every generator of the module `random` deterministic; called once, before any program is seen."""
    shared = SeededRandom(0)
    for name in random.__all__:
        if callable(getattr(shared, name, None)):
            setattr(random, name, getattr(shared, name))
    random.Random = random.SystemRandom = SeededRandom  # type: ignore[misc]


def refuse_text_annotations() -> None:
    """Has the library evaluate no annotation that is text: functools.singledispatch would, past the static check."""

    def get_type_hints(target, *rest, **options):  # type: ignore[no-untyped-def]
        hints = dict(getattr(target, "__annotations__", {}))
        if any(isinstance(hint, str | typing.ForwardRef) for hint in hints.values()):
            raise TypeError("annotations that are text are not evaluated")
        return hints

    typing.get_type_hints = get_type_hints


def careful_wrapping(report_cheat: typing.Callable[[str], typing.NoReturn]) -> dict[str, object]:
    """Returns functools.update_wrapper and wraps that read no attribute but those of their defaults."""

    def update_wrapper(  # type: ignore[no-untyped-def]
        wrapper, wrapped, assigned=functools.WRAPPER_ASSIGNMENTS, updated=functools.WRAPPER_UPDATES
    ):
        assigned, updated = tuple(assigned), tuple(updated)
        for name in assigned + updated:
            if type(name) is not str:
                raise TypeError("attribute name must be string")
            if is_hidden(name) and name not in functools.WRAPPER_ASSIGNMENTS + functools.WRAPPER_UPDATES:
                report_cheat(f"{running_line()}reaches for {name} through update_wrapper()")
        return functools.update_wrapper(wrapper, wrapped, assigned, updated)

    def wraps(wrapped, assigned=functools.WRAPPER_ASSIGNMENTS, updated=functools.WRAPPER_UPDATES):  # type: ignore[no-untyped-def]
        return functools.partial(update_wrapper, wrapped=wrapped, assigned=assigned, updated=updated)

    return {"update_wrapper": update_wrapper, "wraps": wraps}


def public_copy(module: types.ModuleType) -> types.ModuleType:
    """Returns a module with the public names of `module`: without the modules that it imported for itself."""
    copied = types.ModuleType(module.__name__)
    names = getattr(module, "__all__", None) or [name for name in dir(module) if not name.startswith("_")]
    for name in names:
        if name not in WITHHELD.get(module.__name__, ()):
            setattr(copied, name, getattr(module, name))
    return copied


def make_builtins(report_cheat: typing.Callable[[str], typing.NoReturn]) -> dict[str, object]:
    """Returns the table of builtins that a program runs with; `report_cheat` ends the case."""
    modules = {name: public_copy(module) for name, module in PRELOADED.items()}
    modules["collections"].abc = modules["collections.abc"]  # type: ignore[attr-defined]
    vars(modules["functools"]).update(careful_wrapping(report_cheat))
    future = sys.modules["__future__"]

    def import_(name, globals=None, locals=None, fromlist=(), level=0):  # type: ignore[no-untyped-def]
        if name == "__future__":
            return future
        if level or name not in modules:
            raise Refused("foreign_import", f"{running_line()}imports {name}")
        return modules[name if fromlist else name.partition(".")[0]]

    def guarded(function):  # type: ignore[no-untyped-def]
        def call(target, name, *rest):  # type: ignore[no-untyped-def]
            if type(name) is not str:
                raise TypeError("attribute name must be string")
            if is_hidden(name):
                report_cheat(f"{running_line()}reaches for {name} through {function.__name__}()")
            return function(target, name, *rest)

        call.__name__ = call.__qualname__ = function.__name__
        return call

    table: dict[str, object] = {name: getattr(builtins, name) for name in OFFERED_WORDS.split()}
    for name, value in vars(builtins).items():
        if isinstance(value, type) and issubclass(value, BaseException):
            table[name] = value
    for function in (getattr, hasattr, setattr, delattr):
        table[function.__name__] = guarded(function)
    table["print"] = lambda *values, **options: None
    table["__build_class__"] = builtins.__build_class__
    table["__import__"] = import_
    return table


def load(code: types.CodeType, table: dict[str, object], entry: str, *, lock: bool = True) -> typing.Any:
    """Runs the program over a namespace of its own, the table its only builtins; returns the entry, None without one.

    An entry that is a function of the program is made anew over that namespace, with the table put back: whatever was
    hung on it or slipped under __builtins__ while the program loaded is not called by the harness. Its helpers,
    constants and tables are in the namespace; other callables (a cached function, an instance) are called as they are,
    and so is everything without `lock`.
    """
    names: dict[str, typing.Any] = {"__name__": "program", "__builtins__": table}
    types.FunctionType(code, names)()
    function = names.get(entry)
    if not lock or type(function) is not types.FunctionType or function.__globals__ is not names:
        return function
    names["__builtins__"] = table
    locked = types.FunctionType(function.__code__, names, entry, function.__defaults__, function.__closure__)
    locked.__kwdefaults__ = function.__kwdefaults__
    return locked
