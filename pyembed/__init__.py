"""Embedding tables that are larger than memory, trained on a CPU, from numpy.

ids → `Table.gather` → rows → your model → gradient → `optim` step → `Table`.

Importing starts nothing: no thread, no file, no other framework.
"""

from __future__ import annotations

import os

try:
    from pyembed import _core
except ImportError as error:
    raise ImportError(
        f"the extension pyembed._core cannot be loaded ({error}); "
        "in a clone of the repository: make build; else: pip install pyembed-tables"
    ) from error

from pyembed import errors, grouping, init, optim
from pyembed._lookahead import lookahead
from pyembed.errors import PyembedError
from pyembed.grouping import SparseGrad
from pyembed.layers import functional
from pyembed.layers.embedding import Embedding
from pyembed.layers.embedding_bag import EmbeddingBag
from pyembed.optim import schedules
from pyembed.storage import id_map
from pyembed.table import Table
from pyembed.tools import build, convert, export
from pyembed.tools.info import VERSION as __version__  # noqa: F401
from pyembed.tools.info import show_config
from pyembed.words.vocab import Vocab

__all__ = [
    "Embedding",
    "EmbeddingBag",
    "PyembedError",
    "SparseGrad",
    "Table",
    "Vocab",
    "build",
    "convert",
    "errors",
    "export",
    "functional",
    "grouping",
    "id_map",
    "init",
    "lookahead",
    "optim",
    "schedules",
    "show_config",
]

if _level := os.environ.get("PYEMBED_SIMD"):
    try:
        _core.use_simd(_level)
    except ValueError as error:
        raise errors.ArgumentError(f"PYEMBED_SIMD: {error}") from None
