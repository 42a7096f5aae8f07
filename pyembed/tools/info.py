"""Facts about a table, and about this build and machine, for `pyembed info` and `doctor`."""

from __future__ import annotations

import mmap
import os
import platform
from typing import Any

import numpy as np

from pyembed import _core, _threads
from pyembed.table import Table

VERSION = "0.1.0"


def table_facts(path: str | os.PathLike[str], resident: bool = False) -> dict[str, Any]:
    """The facts about a table: sizes, columns and its last commit. A writer may have it open.

    Parameters
    ----------
    path : path-like
        A table, or a bare .npy of float32 rows.
    resident : bool
        Whether to add how many bytes of the table are in the page cache, and how many of them are
        not written yet.

    Returns
    -------
    dict
        Names to values that JSON can hold. ``sealed`` says whether the rows have checksums.

    Raises
    ------
    TableError, FormatError
        If the table cannot be opened.
    """
    with Table.open(path, "r", live=True) as table:
        facts = {
            "path": str(table.path),
            "rows": table.rows,
            "dim": table.dim,
            "columns": table.columns,
            "bytes": table.nbytes,
            "id_map": table.id_map is not None,
            "generation": table.generation,
            "state": table.state,
            "sealed": bool(table.committed.seal),
            "meta": table.meta,
        }
        if resident:
            stats = table.stats()
            facts |= {"resident_bytes": stats.resident_bytes, "dirty_bytes": stats.dirty_bytes}
    return facts


def show_config() -> dict[str, str]:
    """The facts that a bug report needs: SIMD level, OpenMP, threads, page size and versions.

    Returns
    -------
    dict of str to str
        Names of facts to their values.

    Examples
    --------
    >>> sorted(show_config())
    ['numpy', 'openmp', 'page size', 'platform', 'pyembed', 'python', 'simd', 'threads']
    """
    return {
        "pyembed": VERSION,
        "simd": f"{_core.simd_level()} (available: {', '.join(_core.simd_levels())})",
        "openmp": _core.openmp(),
        "threads": str(_threads.default_num_threads()),
        "page size": f"{mmap.PAGESIZE} bytes",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
    }
