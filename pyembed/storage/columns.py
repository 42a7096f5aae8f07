"""The columns of a row, and chunks of new rows."""

from __future__ import annotations

import contextlib
import errno
import mmap
from collections.abc import Iterator, Mapping

import numpy as np

from pyembed import _core
from pyembed._checks import F32, require_count
from pyembed.errors import ArgumentError, TableError
from pyembed.init import Initializer
from pyembed.storage import manifest

# Floats of a chunk of new rows: 8 MiB stay in the cache between making and writing.
CHUNK_FLOATS = 2 << 20


def zeroed_rows(rows: int, stride: int) -> F32:
    """Return zeroed rows in memory, page-aligned, on huge pages where the system grants them.

    Raises
    ------
    TableError
        If memory does not suffice (errno ENOMEM).
    """
    size = 4 * rows * stride
    if size == 0:
        return np.zeros((rows, stride), np.float32)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        raise TableError(
            errno.ENOMEM, f"a table of {size:,} bytes does not fit into memory; use Table.create"
        ) from None
    with contextlib.suppress(OSError, AttributeError):  # a hint; not every system has it
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(rows, stride)


def require_rule(optimizer: str) -> str:
    """Return the name of an optimizer's rule.

    Raises
    ------
    ArgumentError
    """
    if optimizer not in _core.RULES:
        allowed = ", ".join(_core.RULES)
        raise ArgumentError(f"optimizer = {optimizer!r}; allowed: {allowed}, or None")
    return optimizer


def state_widths(rule: str, dim: int) -> dict[str, int]:
    """Return the state columns of a rule: as wide as the weight, or one float per row."""
    state = _core.RULES[rule][1]
    return {name: dim if kind == "element" else 1 for name, kind in state.items()}


def row_columns(
    dim: int, optimizer: str | None, columns: Mapping[str, int] | None
) -> dict[str, int]:
    """Return the columns of a row: the weight, the optimizer's state, then those of the user.

    Raises
    ------
    ArgumentError
        If the optimizer is unknown or a name is used twice.
    """
    widths = {"weight": require_count(dim, "dim", 1, manifest.MAX_DIM)}
    if optimizer is not None:
        widths |= state_widths(require_rule(optimizer), dim)
    for name, width in (columns or {}).items():
        if name in widths:
            raise ArgumentError(
                f"column {name!r} is given twice: dim and optimizer make it already"
            )
        widths[name] = width
    return manifest.check_columns(widths)


def fresh_rows(
    columns: Mapping[str, int],
    first: int,
    count: int,
    init: Initializer,
    seed: int,
    num_threads: int,
) -> Iterator[F32]:
    """Yield chunks of new rows: weight from `init`, other columns zero. The buffer is reused."""
    stride = sum(columns.values())
    step = max(1, CHUNK_FLOATS // stride)
    dim = columns["weight"]
    init = init.for_shape(first + count, dim)
    buffer = np.zeros((count if init.whole else min(step, count), stride), np.float32)
    if init.whole:
        init.fill(buffer[:, :dim], seed, first, num_threads)
        yield buffer
        return
    for row in range(first, first + count, step):
        chunk = buffer[: min(step, first + count - row)]
        init.fill(chunk[:, :dim], seed, row, num_threads)
        yield chunk
