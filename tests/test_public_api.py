"""The house itself: public names, imports that point down, and who may map and sync."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pyembed
from pyembed import _core, errors
from tests.reference import kernels as reference

PACKAGE = Path(pyembed.__file__).parent


def test_only_the_store_maps_and_syncs() -> None:
    """mmap, flock and fallocate appear in storage alone, fsync in its file system alone."""
    mapping = ("mmap.mmap", "flock(", "fallocate", "np.memmap(")
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text()
        if file.parent.name != "storage":
            assert not [word for word in mapping if word in text], file
        if file.name != "fs.py":
            assert "fsync" not in text and "fdatasync" not in text, file


def test_modules_are_imported_by_their_own_path() -> None:
    """Inside the package, `from pyembed import x` names a module, never an alias."""
    modules = {file.stem for file in PACKAGE.glob("*.py")} | {"_core", "optim", "__version__"}
    for file in PACKAGE.rglob("*.py"):
        if file != PACKAGE / "__init__.py":
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module == "pyembed":
                    assert {alias.name for alias in node.names} <= modules, file


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
        "check_ids",
        "overlaps",
        "all_finite",
        "are_finite",
        "ask_pages",
        "map_pages",
        "cached_pages",
        "start_write_back",
        "page_out",
    }
    computing = {name for name, value in vars(_core).items() if inspect.isroutine(value)}
    computing = {name for name in computing - plumbing if not name.startswith("_")}
    rows = {"gather", "scatter_add", "fill", "renorm"}
    groups = {"group", "sum_groups", "add_groups", "global_norm", "update", "catch_up"}
    groups |= {"group_many", "update_many"}
    bags = {"reduce_bags", "bag_dots", "sum_elements"}
    assert computing == rows | groups | bags
    assert all(callable(getattr(reference, name)) for name in computing)


def test_public_names() -> None:
    """__all__ is what is there, and everything public is documented."""
    for name in pyembed.__all__:
        assert inspect.getdoc(getattr(pyembed, name)), name
    for cls in (pyembed.Table, pyembed.Embedding, pyembed.optim.Adam, pyembed.init.Initializer):
        for name, member in inspect.getmembers(cls, callable):
            if not name.startswith("_"):
                assert inspect.getdoc(member), f"{cls.__name__}.{name}"


def test_every_error_is_also_a_builtin() -> None:
    """Each error can be caught as the builtin that a user would expect."""
    for error in vars(errors).values():
        if inspect.isclass(error) and issubclass(error, errors.PyembedError):
            builtin = (IndexError, ValueError, TypeError, OSError)
            assert error is errors.PyembedError or issubclass(error, builtin)


def test_functions_stay_readable() -> None:
    """No function of the package has more than 60 lines, its docstring included."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 60, f"{file.name}: {node.name} has {lines} lines"


def test_tests_say_what_they_promise() -> None:
    """Every test has a docstring."""
    for file in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert ast.get_docstring(node), f"{file.name}: {node.name}"
