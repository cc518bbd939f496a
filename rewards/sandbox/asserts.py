"""`assert` statements as tests: each is split into calls for the program's box and a judgement made without it.

Left out: running either half (`rewards.code`). In `assert abs(f(2) - 3.0) < 1e-6` the program is asked for `f(2)`
alone; its plain value then takes the call's place, and `abs(_0 - 3.0) < 1e-6` is judged where the program has never
been: here if that needs no code to run, else in a box without the program. What the program redefines, it redefines
only for itself, also library names that a test uses without importing them, as MBPP's do
(`math.isclose(f(2), 4.0)`).
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from rewards.api import GroundTruthError
from rewards.sandbox import grading
from rewards.sandbox.inside import plain

MAX_TEST_CHARACTERS = 100_000
_BUILTINS = frozenset(dir(builtins))
_USUAL = (abs, all, any, bool, float, int, isinstance, len, list, round, set, sorted, str, tuple, type)
_MEMBERS = {  # name that tests use without importing it -> its module; no name that a program is likely to define
    "Counter": "collections",
    "OrderedDict": "collections",
    "defaultdict": "collections",
    "deque": "collections",
    "deepcopy": "copy",
    "Decimal": "decimal",
    "Fraction": "fractions",
    "inf": "math",
    "isclose": "math",
}
_ALIASES = {"np": "numpy", "pd": "pandas", "plt": "matplotlib.pyplot", "nx": "networkx", "tf": "tensorflow"}
_PACKAGES = frozenset(_ALIASES.values()) | {"jax", "matplotlib", "pytest", "scipy", "sklearn", "sympy", "torch"}
_CHECKS = frozenset(_MEMBERS).union(function.__name__ for function in _USUAL)
_BINDERS = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.NamedExpr, ast.Await, ast.Yield)


@dataclass(frozen=True, slots=True)
class AssertTest:
    """One split assert statement."""

    source: str
    imports: str  # the test's import statements
    library: str  # import statements of library names that the judgement uses and no test imports
    calls: tuple[str, ...]  # evaluated in the program's box, in this order
    roots: tuple[str, ...]  # names in `calls` that the program must define
    judgement: str  # Python expression of _0, _1, ... (the calls' values)
    expected: grading.Tree | None = None  # when the judgement is `_0 == literal`: the literal
    is_equality: bool = False


def split_asserts(tests: list[str], packages: Collection[str] = ()) -> list[AssertTest]:
    """Split every assert statement of the tests; imports in any of them hold for all.

    Args:
        tests: Python source of each test.
        packages: what the tests may import besides the standard library.

    Raises GroundTruthError for a test that does not consist of `import` and `assert` statements, that asks nothing of
    the program, or whose calls cannot be separated from the rest (calls inside comprehensions or lambdas).
    """
    imports: list[str] = []
    asserts: list[ast.Assert] = []
    for test in tests:
        for statement in _parse(test).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                _check_import(statement, packages)
                imports.append(ast.unparse(statement))
            elif isinstance(statement, ast.Assert):
                asserts.append(statement)
            else:
                raise GroundTruthError(
                    f"the test {_short(test)} holds a {type(statement).__name__} statement; only import and assert"
                    " statements can be separated from the program: write each check as an assert of its own"
                )
    if not asserts:
        raise GroundTruthError("the tests hold no assert statement")
    known = _imported_names(imports)
    try:
        return [_split(statement, "\n".join(imports), known, packages) for statement in asserts]
    except RecursionError as error:
        raise GroundTruthError("an assert statement is nested too deeply to be split") from error


def _check_import(statement: ast.Import | ast.ImportFrom, packages: Collection[str]) -> None:
    if isinstance(statement, ast.ImportFrom):
        modules = [statement.module or ""]
    else:
        modules = [alias.name for alias in statement.names]
    for module in modules:
        top = module.split(".")[0]
        if top not in sys.stdlib_module_names and top not in packages:
            raise GroundTruthError(
                f"a test imports {top or 'a relative module'}, which the sandbox does not have; it has the standard "
                f"library and what the option packages names ({', '.join(packages) or 'nothing'})"
            )


def _parse(test: str) -> ast.Module:
    if len(test) > MAX_TEST_CHARACTERS:
        raise GroundTruthError(f"a test has {len(test)} characters; at most {MAX_TEST_CHARACTERS} are allowed")
    try:
        return ast.parse(test)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise GroundTruthError(f"the test {_short(test)} is not Python: {error}") from error


def _imported_names(imports: list[str]) -> frozenset[str]:
    names = set()
    for source in imports:
        for alias in ast.parse(source).body[0].names:  # type: ignore[attr-defined]
            names.add((alias.asname or alias.name).split(".")[0])
    return frozenset(names)


def _library(expression: ast.expr, imported: frozenset[str], packages: Collection[str], source: str) -> dict[str, str]:
    """Name -> import statement, for the library names that the expression uses though no test imports them.

    These never come from the program: if it redefined `math`, it would judge itself in `math.isclose(f(2), 4.0)`.
    """
    library: dict[str, str] = {}
    own = imported | _bound(expression)
    for node in ast.walk(expression):
        if isinstance(node, ast.Name) and node.id in _MEMBERS and node.id not in own:
            library[node.id] = f"from {_MEMBERS[node.id]} import {node.id}"
        # a module is known by an attribute taken from it: a name that a test calls (`copy(1)`) is not a module
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in own:
            name = node.value.id
            module = _ALIASES.get(name, name)
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top in packages:
                library[name] = f"import {module} as {name}"
            elif module in _PACKAGES:
                raise GroundTruthError(
                    f"{_short(source)} uses {name}, which the sandbox does not have; it has the standard library and "
                    f"what the option packages names ({', '.join(packages) or 'nothing'})"
                )
    return library


def _split(statement: ast.Assert, imports: str, imported: frozenset[str], packages: Collection[str]) -> AssertTest:
    source = ast.unparse(statement)
    library = _library(statement.test, imported, packages, source)
    known = imported | _BUILTINS | library.keys()
    splitter = _Splitter(known, source)
    condition = splitter.visit(_copy(statement.test))
    if not splitter.calls:
        root = _named_like_a_known(statement.test, library)
        if root is None:
            raise GroundTruthError(f"{_short(source)} does not use the program")
        splitter = _Splitter(known - {root}, source)
        condition = splitter.visit(_copy(statement.test))
    judgement = ast.unparse(ast.fix_missing_locations(condition))
    is_equality, expected = _literal_comparison(condition)
    roots = tuple(sorted(splitter.roots))
    used = {node.id for node in ast.walk(condition) if isinstance(node, ast.Name)}
    needed = "\n".join(line for name, line in library.items() if name in used)
    return AssertTest(source, imports, needed, tuple(splitter.calls), roots, judgement, expected, is_equality)


def _named_like_a_known(expression: ast.expr, library: Collection[str]) -> str | None:
    """The function under test if all names are known: one from a library (`Fraction`), or else a builtin (`sum`).

    Of several, the first that tests do not usually check with.
    """
    nodes = list(ast.walk(expression))
    members = [node.id for node in nodes if isinstance(node, ast.Name) and node.id in library and node.id in _MEMBERS]
    called = [name for name in map(_called_builtin, nodes) if name]
    return min(members + called, key=lambda name: name in _CHECKS, default=None)


def _copy(expression: ast.expr) -> ast.expr:
    return ast.parse(ast.unparse(expression), mode="eval").body


def _called_builtin(node: ast.AST) -> str | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BUILTINS:
        return node.func.id
    return None


class _Splitter(ast.NodeTransformer):
    """Replaces every maximal expression that starts with one of the program's names by a numbered name."""

    def __init__(self, known: frozenset[str], source: str) -> None:
        self.known = known
        self.source = source
        self.calls: list[str] = []
        self.roots: set[str] = set()

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Call | ast.Attribute | ast.Subscript | ast.Name):
            root = _root(node)
            if root is not None and root.id not in self.known:
                return self._replace(node)
        if isinstance(node, _BINDERS) and any(
            isinstance(inner, ast.Name) and inner.id not in self.known and inner.id not in _bound(node)
            for inner in ast.walk(node)
        ):
            raise GroundTruthError(
                f"{_short(self.source)} calls the program inside a comprehension or lambda, which cannot be separated"
                " from it; write the cases as asserts of their own"
            )
        return self.generic_visit(node) if not isinstance(node, _BINDERS) else node

    def _replace(self, node: ast.expr) -> ast.expr:
        outer: list[tuple[type[ast.AST], Any]] = []
        # what follows the last call (an index, an attribute) is applied to the plain value, outside the program
        while isinstance(node, ast.Attribute | ast.Subscript) and any(isinstance(n, ast.Call) for n in _chain(node)):
            outer.append((type(node), node.attr if isinstance(node, ast.Attribute) else node.slice))
            node = node.value
        self.roots |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - self.known - _bound(node)
        self.calls.append(ast.unparse(node))
        made: ast.expr = ast.Name(f"_{len(self.calls) - 1}", ast.Load())
        for kind, detail in reversed(outer):
            if kind is ast.Attribute:
                made = ast.Attribute(made, detail, ast.Load())
            else:
                made = ast.Subscript(made, self.visit(detail), ast.Load())
        return made


def _chain(node: ast.AST) -> list[ast.AST]:
    links = [node]
    while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
        links.append(node)
    return links


def _root(node: ast.AST) -> ast.Name | None:
    last = _chain(node)[-1]
    return last if isinstance(last, ast.Name) else None


def _bound(node: ast.AST) -> frozenset[str]:
    """Names that comprehensions, lambdas and := inside the expression bind."""
    stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return frozenset(stored | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)})


def _literal_comparison(condition: ast.expr) -> tuple[bool, grading.Tree | None]:
    """Whether the judgement is `_0 == literal`, either way round, and the literal."""
    if not isinstance(condition, ast.Compare) or len(condition.ops) != 1 or not isinstance(condition.ops[0], ast.Eq):
        return False, None
    sides = [condition.left, condition.comparators[0]]
    for hole, other in (sides, sides[::-1]):
        if isinstance(hole, ast.Name) and hole.id == "_0":
            try:
                return True, grading.tree_of(ast.literal_eval(other))
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                return False, None
    return False, None


def judge_here(test: AssertTest, value: bytes | None, tolerance: float) -> bool | None:
    """The verdict on the value of the test's EvaluateTask if that needs no code to run, else None.

    A value with a part that has no plain form fails every test: it cannot be judged outside the program that made it.
    """
    try:
        values = grading.parse_value(value)
    except plain.NotPlainError:
        return False
    if not isinstance(values, list) or len(values) != len(test.calls) or grading.holds_opaque(values):
        return False
    if test.is_equality:
        return grading.same_value(values[0], test.expected, tolerance, lists_are_tuples=False)
    if test.judgement in ("_0", "not _0") and isinstance(values[0], bool):
        return values[0] is (test.judgement == "_0")
    return None


def judge_source(test: AssertTest) -> str:
    """A program that defines `judge(*values)`, to be run in a box without the untrusted program."""
    names = ", ".join(f"_{i}" for i in range(len(test.calls)))
    return f"{test.imports}\n{test.library}\ndef judge({names}):\n    return bool({test.judgement})\n"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 80 else text[:77] + "...")
