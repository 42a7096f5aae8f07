"""The house itself: public names, imports that point down, and who may map and sync."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pyembed
from pyembed import _core, errors, reference

PACKAGE = Path(pyembed.__file__).parent

# Invariant 1 of ARCHITECTURE.md: a module imports only from rooms below its own.
ROOMS = [
    {"errors"},
    {"_core"},
    {"threads", "arrays", "reference_rules", "schedules"},
    {"reference", "options"},
    {"init", "grouping", "manifest", "files", "hot"},
    {"order", "residency", "journal", "touched", "seal"},
    {"undo", "changes"},
    {"interval"},
    {"store", "making", "layout"},
    {"rows", "bags", "vocab", "formats"},
    {"table"},
    {"embedding", "build", "verify", "convert"},
    {"embedding_bag", "export"},
    {"optimizer", "functional", "config", "lookahead"},
    {"many"},
    {"optim"},
    {"train", "torch"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, room in enumerate(ROOMS) for name in room}


def modules() -> list[tuple[str, ast.Module]]:
    """(room, syntax tree) of every module but the package's own __init__."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE)
        if str(place) != "__init__.py":
            found.append((place.parts[0].removesuffix(".py"), ast.parse(file.read_text())))
    return found


def imported(tree: ast.Module) -> set[str]:
    """The rooms of pyembed that a module imports at its top level."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyembed"):
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return names


def test_imports_point_down() -> None:
    """No module imports from its own room's level or above, other than its own package."""
    for name, tree in modules():
        for other in imported(tree) & LEVEL.keys() - {name}:
            assert LEVEL[other] < LEVEL[name], f"{name} imports {other}"


def test_every_module_has_a_room() -> None:
    """A new file is given its place in the order, here and in ARCHITECTURE.md."""
    assert {name for name, _ in modules()} <= LEVEL.keys()


def test_only_the_store_maps_and_syncs() -> None:
    """mmap, flock and fallocate appear in store.py and files.py alone, fsync in files.py."""
    words = ("mmap.mmap", "os.fsync", "os.fdatasync", "flock(", "fallocate", "np.memmap(")
    for file in PACKAGE.rglob("*.py"):
        if file.name not in ("store.py", "files.py"):
            text = file.read_text()
            assert not [word for word in words if word in text], file


def test_only_the_adapter_imports_torch() -> None:
    """Outside of pyembed/torch nothing imports torch, nor the adapter."""
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).parts[0] != "torch":
            for node in ast.walk(ast.parse(file.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                for name in names:
                    assert f"{name}.".split("torch.")[0] not in ("", "pyembed."), file


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
    kernels = {name for name, value in vars(_core).items() if inspect.isroutine(value)}
    kernels = {name for name in kernels - plumbing if not name.startswith("_")}
    rows = {"gather", "scatter_add", "fill", "renorm"}
    groups = {"group", "sum_groups", "add_groups", "global_norm", "update", "catch_up"}
    groups |= {"group_many", "update_many"}
    bags = {"reduce_bags", "bag_dots", "sum_elements"}
    assert kernels == rows | groups | bags
    assert all(callable(getattr(reference, name)) for name in kernels)


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


def test_files_stay_readable() -> None:
    """No source file of the package has more than 500 lines."""
    for file in PACKAGE.rglob("*"):
        if file.suffix in (".py", ".pyx", ".pxi", ".h") or file.parent.name == "_kernels":
            assert len(file.read_text().splitlines()) <= 500, file


def test_tests_say_what_they_promise() -> None:
    """Every test has a docstring."""
    for file in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert ast.get_docstring(node), f"{file.name}: {node.name}"
