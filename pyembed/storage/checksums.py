"""Checksums of rows that did not change since they were written: one for each MiB of their file.

A table is sealed when it is made, while its rows are streamed out, and until a commit of others.
The checksums are a file that any numpy opens, ``seal.npy``: uint32, the CRC-32C of bytes 0..1 MiB,
1..2 MiB, … of ``rows.npy``, of which the first leaves the header out. The manifest has the CRC-32C
of that file, so that neither can be damaged, or be of another table, without notice.

What changes in place has no checksum: to keep one, every change would read a MiB.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyembed import _core
from pyembed.errors import FormatError
from pyembed.storage.fs import HEADER_BYTES, SUM_BYTES, block_sums, sync, write_all

FILE = "seal.npy"
READ_BYTES = 8 << 20  # of the rows at a time
NAMED = 8  # runs of damaged rows in a message

U32 = NDArray[np.uint32]


def save(folder: Path, sums: Sequence[int]) -> str:
    """Write the checksums into a new folder, durably; returns what the manifest says of them."""
    buffer = io.BytesIO()
    np.save(buffer, np.array(sums, "<u4"), allow_pickle=False)
    data = buffer.getvalue()
    fd = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_all(fd, data)
        sync(fd)
    finally:
        os.close(fd)
    return f"{_core.crc32c(data):08x}"


def load(folder: Path, seal: str) -> U32:
    """The checksums that a manifest speaks of.

    Raises
    ------
    FormatError
        If the file is damaged, or of another table.
    FileNotFoundError
    """
    data = (folder / FILE).read_bytes()
    if f"{_core.crc32c(data):08x}" != seal:
        raise FormatError(
            f"{folder / FILE}: damaged, or of another table; restore the table from a copy"
        )
    sums: U32 = np.load(io.BytesIO(data), allow_pickle=False)
    return sums


def read(file: Path) -> Iterator[list[int]]:
    """The checksums of a file as it is, a few at a time; read, not mapped."""
    with file.open("rb") as opened:
        at = 0
        while data := opened.read(READ_BYTES):
            yield block_sums(memoryview(data), at)
            at += len(data)


def compare(file: Path, found: Sequence[int] | U32, expected: U32, stride: int) -> None:
    """Whether rows of so many floats are those that were sealed.

    Raises
    ------
    FormatError
        Naming the rows that are not.
    """
    found = np.array(found, np.uint32)
    if found.shape != expected.shape:
        raise FormatError(f"{file}: {found.size} blocks; its seal is of {expected.size}")
    bad = np.flatnonzero(found != expected)
    if bad.size:
        runs = np.split(bad, np.flatnonzero(np.diff(bad) > 1) + 1)
        size = file.stat().st_size
        rows = [_rows(int(run[0]), int(run[-1]), size, stride) for run in runs[:NAMED]]
        more = f" and {len(runs) - NAMED} places more" if len(runs) > NAMED else ""
        raise FormatError(
            f"{file}: {bad.size} of {found.size} blocks of 1 MiB are damaged, in which are rows "
            f"{', '.join(rows)}{more}; restore them from a copy"
        )


def _rows(first: int, last: int, size: int, stride: int) -> str:
    """The rows that have a byte in these blocks of a file of this size."""
    start = max(HEADER_BYTES, first * SUM_BYTES) - HEADER_BYTES
    end = min(size, (last + 1) * SUM_BYTES) - HEADER_BYTES
    return f"{start // (4 * stride)}..{(end - 1) // (4 * stride)}"
