"""Prove the rules of the layout that import-linter does not know: where SQL is, how long modules are, no cycles."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "opsentry"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

MAX_LINES = 350

SQL_PACKAGES = (
    "opsentry.events",
    "opsentry.identity",
    "opsentry.projections",
    "opsentry.notifications.delivery",
    "opsentry.infrastructure",
)
SQL = re.compile(r"\bSELECT\b.*\bFROM\b|\bINSERT INTO\b|\bUPDATE\b.*\bSET\b|\bDELETE FROM\b", re.DOTALL)


def syntax_tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def docstrings(tree: ast.Module) -> set[ast.Constant]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, documented)
        and node.body
        and isinstance(node.body[0], ast.Expr)
        and isinstance(node.body[0].value, ast.Constant)
    }


def has_sql(tree: ast.Module) -> bool:
    """Return whether a string holds SQL, where an f-string or a sum of strings counts as one."""
    prose = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.BinOp | ast.Constant) and node not in prose:
            parts = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
            if SQL.search(" ".join(part for part in parts if isinstance(part, str))):
                return True
    return False


def runtime_imports(module: str) -> Iterator[str]:
    """Yield the Opsentry modules that a module imports, in functions too: a late import hides a cycle."""
    is_package = MODULES[module].name == "__init__.py"
    pending: list[ast.AST] = [syntax_tree(module)]
    while pending:
        node = pending.pop()
        if _is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                target = f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base
                if target in MODULES and target != module:
                    yield target
        pending.extend(ast.iter_child_nodes(node))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of one cycle, its first node again at the end; empty if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for target in sorted(graph.get(node, ())):
                if cycle := visit(target, [*path, node]):
                    return cycle
            done.add(node)
        return []

    for node in sorted(graph):
        if cycle := visit(node, []):
            return cycle
    return []


def test_sql_is_only_in_its_packages():
    outside = {module for module in MODULES if not f"{module}.".startswith(tuple(f"{name}." for name in SQL_PACKAGES))}
    assert {module for module in outside if has_sql(syntax_tree(module))} == set()


def test_modules_are_short():
    long = {module for module, path in MODULES.items() if len(path.read_text().splitlines()) > MAX_LINES}
    assert long == set()


def test_modules_import_each_other_without_cycles():
    assert find_cycle({module: set(runtime_imports(module)) for module in MODULES}) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('Q = "SELECT a FROM b"', True),
        ('Q = f"""SELECT a\\nFROM {table}"""', True),
        ('Q = "SELECT a" + " FROM b"', True),
        ('Q = "UPDATE a " "SET b = 1"', True),
        ('run("INSERT INTO a VALUES (1)")', True),
        ('run("DELETE FROM a")', True),
        ('"""SELECT a FROM b."""', False),
        ('Q = "select a colour from the list"', False),
        ('Q = "SELECT a colour"', False),
    ],
)
def test_sql_is_recognised(source, expected):
    assert has_sql(ast.parse(source)) == expected


def test_a_cycle_is_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}}) == []
