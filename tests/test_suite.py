"""The tests themselves: imports, child processes and docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash import torture
from tests.helpers.child import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))
TESTS = [path for path in FILES if path.name.startswith("test_")]


def name_of(path: Path) -> str:
    """Return the path of a test module below the folder of the tests."""
    return str(path.relative_to(ROOT / "tests"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names of all imports, also those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_imports_a_test(path: Path) -> None:
    """Shared parts of tests are in modules of their own, which hold no test."""
    names = imported(ast.parse(path.read_text()))
    wrong = [name for name in names if name.startswith("tests.") and ".test_" in name]
    assert wrong == []


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_every_test_states_its_promise(path: Path) -> None:
    """Every test has a docstring."""
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    tests = [function for function in functions if function.name.startswith("test_")]
    assert [test.name for test in tests if not ast.get_docstring(test)] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_program_in_a_string(path: Path) -> None:
    """A child process runs a function (`tests.helpers.child`), which linters and mypy read."""
    lists = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.List)]
    literals = [[ast.unparse(element) for element in node.elts] for node in lists]
    assert [x for x in literals if "sys.executable" in x and "'-c'" in x] == []


def test_the_crash_suite_needs_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without git, and without `stat`, the counts of the crash suite say that they are unknown."""
    monkeypatch.setenv("PATH", "")
    place = torture.where()
    assert "commit unknown" in place
    assert "tables on an unknown file system" in place
