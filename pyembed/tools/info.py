"""What this build and this machine are, in the words that a bug report needs."""

from __future__ import annotations

import mmap
import platform

import numpy as np

from pyembed import _core, _threads

VERSION = "0.1.0"


def show_config() -> dict[str, str]:
    """SIMD level, OpenMP runtime, threads, page size and versions.

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
