"""The house itself: what is public, how modules are imported, and what may map and sync."""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyembed
from pyembed import _core, errors
from tests.helpers.public import PUBLIC, public_module
from tests.reference import kernels as reference

PACKAGE = Path(pyembed.__file__).parent


def exported(module: types.ModuleType) -> list[str]:
    """The names of `__all__`, or without one the public functions and classes defined there."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    members = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return [n for n, v in members.items() if getattr(v, "__module__", None) == module.__name__]


def sources() -> Iterator[tuple[Path, ast.Module]]:
    """Every Python file of the package, parsed."""
    for file in PACKAGE.rglob("*.py"):
        yield file, ast.parse(file.read_text())


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name: str) -> None:
    """Each public module exports exactly its public names, and each of them is documented."""
    module = public_module(name)
    assert sorted(exported(module)) == sorted(PUBLIC[name].split())
    for public in exported(module):
        assert inspect.getdoc(getattr(module, public)), public


def test_internals_are_not_attributes() -> None:
    """`pyembed` shows its public names and modules only: no helper, no constant."""
    names = {name for name, value in vars(pyembed).items() if not inspect.ismodule(value)}
    shown = {name for name in names if not name.startswith("_")} - {"annotations"}
    assert shown <= set(pyembed.__all__)


def test_few_modules_at_the_top() -> None:
    """`pyembed/` has at most 16 modules of its own; every other module is in a room."""
    assert len(list(PACKAGE.glob("*.py")) + list(PACKAGE.glob("*.pyx"))) <= 16


def test_every_room_introduces_itself() -> None:
    """The `__init__.py` of a room says what the room is for and what it may import."""
    for file in PACKAGE.glob("*/__init__.py"):
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
        assert "import" in text, file


def test_only_storage_maps_and_syncs() -> None:
    """Calls that map, lock or allocate files are in storage alone, syncs in its `fs.py` alone."""
    mapping = {"mmap", "memmap", "flock", "lockf", "fallocate", "posix_fallocate", "mmap_mode"}
    syncing = {"fsync", "fdatasync", "sync_file_range"}
    for file, tree in sources():
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        used = {getattr(call.func, "attr", getattr(call.func, "id", "")) for call in calls}
        used |= {keyword.arg for call in calls for keyword in call.keywords if keyword.arg}
        if file.parent.name != "storage":
            assert not used & mapping, file
        if file != PACKAGE / "storage" / "fs.py":
            assert not used & syncing, file


def test_modules_are_imported_by_their_own_path() -> None:
    """Inside the package, `from pyembed import x` names a module, never an alias."""
    modules = {file.stem for file in PACKAGE.glob("*.py")} | {"_core"}
    modules |= {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    for file, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "pyembed":
                assert {alias.name for alias in node.names} <= modules, file


def test_private_names_stay_in_their_module() -> None:
    """No module uses another module's names that begin with an underscore."""
    # of NamedTuple and of torch
    others = {"_replace", "_active_ddp_module", "_join_config", "_version"}
    modules = {file.stem for file in PACKAGE.rglob("_*.py*")}
    for file, tree in sources():
        nodes = list(ast.walk(tree))
        defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        stored = [node for node in nodes if isinstance(getattr(node, "ctx", None), ast.Store)]
        defined |= {str(getattr(node, "attr", getattr(node, "id", ""))) for node in stored}
        imported = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        used = {alias.name for node in imported for alias in node.names} - modules
        for node in nodes:
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
                used.add(node.attr)
        private = {name for name in used if name.startswith("_") and not name.endswith("__")}
        assert private <= defined | others | {"_core"}, file


def test_kernels_cannot_fail() -> None:
    """No kernel source allocates, knows Python, or starts a thread."""
    for file in (PACKAGE / "_kernels").iterdir():
        text = file.read_text()
        for word in ("malloc", "Python.h", "<omp.h>", "#pragma omp", "abort(", "printf"):
            assert word not in text, f"{file.name}: {word}"


def test_reference_has_the_names_of_the_kernels() -> None:
    """Every function of the boundary that computes has a twin in reference.py."""
    plumbing = {
        "use_simd",
        "simd_level",
        "simd_levels",
        "openmp",
        "pause_threads",
        "crc32c",
        "crc32c_pieces",
        "mark_rows",
        "unmarked_rows",
        "check",
        "check_ids",
        "read_batch",
        "overlaps",
        "all_finite",
        "first_refused",
        "readahead",
        "map_pages",
        "cached_pages",
        "start_write_back",
        "page_out",
    }
    computing = {name for name, value in vars(_core).items() if inspect.isroutine(value)}
    computing = {name for name in computing - plumbing if not name.startswith("_")}
    rows = {"gather", "scatter_add", "fill", "renorm"}
    groups = {"group", "sum_groups", "add_groups", "global_norm", "update", "catch_up"}
    bags = {"reduce_bags", "bag_dots", "sum_elements"}
    assert computing == rows | groups | bags
    assert all(callable(getattr(reference, name)) for name in computing)


def test_every_error_is_also_a_builtin() -> None:
    """Each error can be caught as the builtin that a user would expect."""
    for error in vars(errors).values():
        if inspect.isclass(error) and issubclass(error, errors.PyembedError):
            builtin = (IndexError, ValueError, TypeError, OSError)
            assert error is errors.PyembedError or issubclass(error, builtin)
            assert issubclass(error, RuntimeError)  # as torch raises


def test_functions_stay_readable() -> None:
    """No function of the package has more than 60 lines, its docstring included."""
    for file, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 60, f"{file.name}: {node.name} has {lines} lines"


def test_tests_say_what_they_promise() -> None:
    """Every test has a docstring."""
    for file in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert ast.get_docstring(node), f"{file.name}: {node.name}"
