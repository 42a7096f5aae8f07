"""Keep the first rows of a table in memory: read them, then lock their pages with mlock.

Pages of a file that nobody used for a while are given back when memory is short, also those that
the next batch needs. A locked page stays. A process may lock only so much (RLIMIT_MEMLOCK), so as
many rows are locked as it may, and a warning says what is missing.

It knows addresses, and neither files nor what the rows mean.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import warnings
from collections.abc import Iterable, Iterator

from pyembed._checks import F32

PIECE_BYTES = 64 << 20  # locked by one call: Ctrl-C is noticed between two
READ_BYTES = 128 << 10  # the system's usual read-ahead: it may ignore what one advice asks beyond
MADV_WILLNEED = 3
MADV_POPULATE_READ = 22  # Linux 5.14

Span = tuple[int, int]  # address of a page, and bytes


def lock_rows(columns: Iterable[F32], n: int) -> int:
    """Read and lock the first `n` rows.

    Parameters
    ----------
    columns : float32 arrays of shape (rows, any)
        They may lie side by side in one array, or apart.
    n : int
        At most rows.

    Returns
    -------
    int
        How many rows are locked, from row 0 on: fewer than `n` only with a RuntimeWarning.
    """
    columns, libc = list(columns), _libc()
    row_bytes = 4 * sum(column.shape[1] for column in columns)
    step = max(1, PIECE_BYTES // row_bytes)
    for first in range(0, n, step):
        for span in _spans(columns, first, min(n, first + step)):
            _warm(libc, *span)
    locked = reason = 0
    while locked < n and step:
        end = min(n, locked + step)
        reason = next(filter(None, (_lock(libc, *s) for s in _spans(columns, locked, end))), 0)
        if reason:  # take back what this step locked, but the page that it shares with the last row
            for span in _spans(columns, locked, end):
                libc.munlock(*span)
            for span in _spans(columns, max(0, locked - 1), locked):
                libc.mlock(*span)
            step = (end - locked) // 2  # to the last row that the limit leaves room for
        else:
            locked = end
    if locked < n:
        soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        limit = "no limit" if soft == resource.RLIM_INFINITY else f"a limit of {soft:,} bytes"
        warnings.warn(
            f"{locked:,} of {n:,} rows are locked in memory, the others were read but may be given "
            f"back: {os.strerror(reason)}, with {limit} (RLIMIT_MEMLOCK) for {n * row_bytes:,} "
            "bytes of rows; raise it with `ulimit -l`, which counts KiB, before the program starts",
            RuntimeWarning,
            stacklevel=3,
        )
    return locked


def unlock_rows(columns: Iterable[F32]) -> None:
    """Let the system give back the pages of all rows again."""
    libc, columns = _libc(), list(columns)
    for span in _spans(columns, 0, len(columns[0])):
        libc.munlock(*span)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    for function in (libc.mlock, libc.munlock):
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _spans(columns: Iterable[F32], first: int, end: int) -> Iterator[Span]:
    """The pages of some rows. Columns side by side lie on the same ones: these come once."""
    found: set[Span] = set()
    for column in columns:
        if first < end:
            base, stride = column.ctypes.data, column.strides[0]
            low, high = sorted((base + first * stride, base + (end - 1) * stride))
            start = low // mmap.PAGESIZE * mmap.PAGESIZE
            stop = -(-(high + 4 * column.shape[1]) // mmap.PAGESIZE) * mmap.PAGESIZE
            found.add((start, stop - start))
    yield from sorted(found)


def _warm(libc: ctypes.CDLL, address: int, length: int) -> None:
    """Read pages from disk, many at a time: mlock alone reads page after page."""
    for at in range(address, address + length, READ_BYTES):
        libc.madvise(at, min(READ_BYTES, address + length - at), MADV_WILLNEED)
    # Waits for them. Older systems do not know it; then mlock waits, and a disk's error is its own.
    libc.madvise(address, length, MADV_POPULATE_READ)


def _lock(libc: ctypes.CDLL, address: int, length: int) -> int:
    """0, or the errno that says why not."""
    return ctypes.get_errno() if libc.mlock(address, length) else 0
