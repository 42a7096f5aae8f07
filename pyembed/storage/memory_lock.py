"""Keep the first rows of a table in memory: read them, then lock their pages with mlock.

When memory is short, the system evicts pages of a file that were not used for a while, even if the
next batch needs them. A locked page stays. A process may lock a limited amount of memory
(RLIMIT_MEMLOCK); rows are locked up to this limit, and a warning names the number of the others.

This module works on addresses; it knows neither files nor columns of rows.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import warnings
from collections.abc import Iterable, Iterator

from pyembed._checks import F32

PIECE_BYTES = 64 << 20  # bytes locked by one call, between two checks for Ctrl-C
READ_BYTES = 128 << 10  # the system's usual readahead; it may ignore the rest of a longer advice
MADV_WILLNEED = 3
MADV_POPULATE_READ = 22  # Linux 5.14

Span = tuple[int, int]  # address of a page, and bytes


def lock_rows(columns: Iterable[F32], n: int) -> int:
    """Read and lock the first `n` rows.

    Parameters
    ----------
    columns : float32 arrays of shape (rows, any)
        Columns of one array, or separate arrays.
    n : int
        At most rows.

    Returns
    -------
    int
        The number of locked rows, from row 0 on: less than `n` only with a RuntimeWarning.
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
        if reason:  # unlock the rows of this step, except a page that they share with locked rows
            for span in _spans(columns, locked, end):
                libc.munlock(*span)
            for span in _spans(columns, max(0, locked - 1), locked):
                libc.mlock(*span)
            step = (end - locked) // 2  # a binary search for the last row within the limit
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
    """Let the system evict the pages of all rows again."""
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
    """Yield the pages of some rows. Columns of one row share pages, which are yielded once."""
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
    """Read pages from disk, many at a time, because mlock reads one page after the other."""
    for at in range(address, address + length, READ_BYTES):
        libc.madvise(at, min(READ_BYTES, address + length - at), MADV_WILLNEED)
    # This call waits for the pages. On older systems it fails, and mlock waits instead.
    libc.madvise(address, length, MADV_POPULATE_READ)


def _lock(libc: ctypes.CDLL, address: int, length: int) -> int:
    """Lock pages; return 0, or the errno of the failure."""
    return ctypes.get_errno() if libc.mlock(address, length) else 0
