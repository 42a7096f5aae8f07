"""Checksums of rows that did not change since they were written: one for each MiB of their file.

A table gets them when it is made, while its rows are streamed out, and loses them at the first
commit of changed rows. They are stored in ``seal.npy``, an array of uint32: the CRC-32C of bytes
0..1 MiB, 1..2 MiB, … of ``rows.npy``, of which the first leaves the header out. The manifest has
the CRC-32C of that file, which detects damage to either file, and a file of another table.

Rows that change in place have no checksum, because to keep one, every change would read a MiB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pyembed import _core
from pyembed.errors import FormatError
from pyembed.storage import npy
from pyembed.storage.fs import File, Folder
from pyembed.storage.npy import HEADER_BYTES

FILE = "seal.npy"
BLOCK_BYTES = 1 << 20  # bytes of the file for each checksum
READ_BYTES = 8 << 20  # bytes read at a time
NAMED = 8  # runs of damaged rows in a message

U32 = NDArray[np.uint32]


def block_sums(view: memoryview, at: int) -> list[int]:
    """Return the CRC-32C of each block of a piece of a file.

    The table's header is left out: it is compared with the manifest, and may be written last.

    Parameters
    ----------
    view : memoryview
    at : int
        Where the piece begins in the file, in bytes: a multiple of `BLOCK_BYTES`.
    """
    first = max(0, HEADER_BYTES - at)
    starts = range(0, len(view), BLOCK_BYTES)
    return [_core.crc32c(view[max(first, start) : start + BLOCK_BYTES]) for start in starts]


def save(folder: Folder, sums: Sequence[int]) -> str:
    """Write the checksums into a new folder; return their own checksum, for the manifest."""
    array = np.array(sums, "<u4")
    data = npy.header_of(array) + array.tobytes()
    folder.write(FILE, [data])
    return f"{_core.crc32c(data):08x}"


def load(folder: Folder, seal: str) -> U32:
    """Read the checksums that a manifest names.

    Raises
    ------
    FormatError
        If the file is damaged, or of another table.
    FileNotFoundError
    """
    data, path = folder.read(FILE), folder.path / FILE
    if f"{_core.crc32c(data):08x}" != seal:
        raise FormatError(f"{path}: damaged, or of another table; restore the table from a copy")
    return np.frombuffer(data, "<u4", offset=npy.read(data[: npy.HEAD_BYTES], path).offset)


def read(file: File) -> Iterator[list[int]]:
    """Read a file, without mapping it, and yield its checksums, a few at a time."""
    at = 0
    while data := file.read_at(READ_BYTES, at):
        yield block_sums(memoryview(data), at)
        at += len(data)


def compare(file: File, found: Sequence[int] | U32, expected: U32, stride: int) -> None:
    """Compare the checksums of rows with the expected ones.

    Parameters
    ----------
    file : File
        The rows.
    found, expected : sequence of int, uint32 array
    stride : int
        Floats of a row.

    Raises
    ------
    FormatError
        Naming the rows that are damaged.
    """
    found = np.array(found, np.uint32)
    if found.shape != expected.shape:
        raise FormatError(f"{file.path}: {found.size} blocks; its seal is of {expected.size}")
    bad = np.flatnonzero(found != expected)
    if bad.size:
        runs = np.split(bad, np.flatnonzero(np.diff(bad) > 1) + 1)
        rows = [_rows(int(run[0]), int(run[-1]), file.size, stride) for run in runs[:NAMED]]
        more = f" and {len(runs) - NAMED} places more" if len(runs) > NAMED else ""
        raise FormatError(
            f"{file.path}: {bad.size} of {found.size} blocks of 1 MiB are damaged, in which are "
            f"rows {', '.join(rows)}{more}; restore them from a copy"
        )


def _rows(first: int, last: int, size: int, stride: int) -> str:
    """Name the rows that have a byte in these blocks."""
    start = max(HEADER_BYTES, first * BLOCK_BYTES) - HEADER_BYTES
    end = min(size, (last + 1) * BLOCK_BYTES) - HEADER_BYTES
    return f"{start // (4 * stride)}..{(end - 1) // (4 * stride)}"
