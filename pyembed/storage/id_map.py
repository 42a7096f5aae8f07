"""The id map of a table whose rows are ordered by frequency: which row each id has.

Ids in the order of a data set are spread over the whole table, so every page holds one or two hot
rows and many cold ones. In a table that is ordered by frequency the hot rows share pages, and a
batch needs few pages.

An id map is an array, ``id_map[id] = row``, stored as ``id_map.npy`` in the table's folder. This
module makes it from counts, and reads and writes its file. It moves no values: a value belongs to
its row, whichever id has that row.

Counts and ids are accepted as they are or refused: nothing is clipped, rounded or padded.
"""

from __future__ import annotations

import math
import mmap
import os
from array import array
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib.format import MAGIC_PREFIX
from numpy.typing import ArrayLike, NDArray

from pyembed._checks import require_count
from pyembed.errors import ArgumentError, DTypeError, FormatError, IdError, PyembedError
from pyembed.storage import npy
from pyembed.storage.fs import Folder
from pyembed.storage.manifest import MAX_ROWS

__all__ = ["by_frequency", "count_ids", "read_counts"]

FILE = "id_map.npy"
MAX_COUNT = np.iinfo(np.int64).max
CHUNK_IDS = 1 << 20  # ids read at a time, at least: 8 MB
ONE_EACH = "allowed: integers of 0 or more, one for each id"


def by_frequency(counts: ArrayLike, rows: int | None = None) -> NDArray[np.int64]:
    """Make an id map: row 0 for the most frequent id; of equally frequent ids the smaller first.

    Takes about 32 bytes of memory per id while it sorts, counts and result included.

    Parameters
    ----------
    counts : integers of shape (rows,)
        How often each id occurs.
    rows : int, optional
        The number of counts that is required.

    Returns
    -------
    int64 array of shape (rows,)
        ``id_map[id] = row``, each row once.

    Raises
    ------
    ArgumentError
        If a count is negative, or the number of counts is wrong.
    DTypeError
        If the counts are not integers.

    Examples
    --------
    >>> from pyembed import id_map
    >>> id_map.by_frequency([3, 9, 0, 3])
    array([1, 0, 3, 2])
    """
    checked = _as_counts(counts, "counts")
    if rows is not None and len(checked) != rows:
        raise ArgumentError(
            f"counts has {len(checked)} elements; allowed: {rows}, one for each row; "
            "count 0 for an id that does not occur"
        )
    id_of_row = np.argsort(-checked, kind="stable")
    id_map = np.empty(len(checked), np.int64)
    id_map[id_of_row] = np.arange(len(checked))
    return id_map


def read_counts(path: str | os.PathLike[str]) -> NDArray[np.int64]:
    """Read how often each id occurs; takes 8 bytes of memory per id.

    Parameters
    ----------
    path : path-like
        A 1-D .npy array of integers, or a text with one integer per line; id 0 comes first.

    Returns
    -------
    ndarray of int64, shape (rows,)
        The count of each id.

    Raises
    ------
    FormatError
        If a count is not an integer of 0 or more; it names the line or the element.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "counts.txt"
    >>> _ = file.write_text("3\\n9\\n0\\n")
    >>> read_counts(file)
    array([3, 9, 0])
    """
    path = Path(path)
    with path.open("rb") as file:
        if file.read(6) == MAGIC_PREFIX:
            header = _integers(path, file)
            shape = header.shape
            if len(shape) != 1:
                raise FormatError(f"{path}: shape {shape}; allowed: one dimension, a count an id")
            counts = np.fromfile(file, header.dtype)[: shape[0]]
        else:
            file.seek(0)
            counts = _parse(path, file)
    if not len(counts):
        raise FormatError(f"{path} holds no counts; {ONE_EACH}")
    try:
        return _as_counts(counts, f"{path}: counts")
    except PyembedError as error:
        raise FormatError(str(error)) from None


def count_ids(path: str | os.PathLike[str], rows: int) -> NDArray[np.int64]:
    """Count the ids of a file that may be larger than memory.

    Takes about 28 bytes of memory per row, and at least 20 MB, however long the file is.

    Parameters
    ----------
    path : path-like
        An .npy array of ids, of any shape and integer dtype.
    rows : int
        Number of rows of the table: ids are 0..rows-1.

    Returns
    -------
    ndarray of int64, shape (rows,)
        The count of each id.

    Raises
    ------
    FormatError
        If the file is not an .npy file of integers, or holds no ids.
    IdError
        If the table has no row for an id; it names the first one.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "ids.npy"
    >>> np.save(file, [2, 0, 2])
    >>> count_ids(file, rows=4)
    array([1, 0, 2, 0])
    """
    path, rows = Path(path), require_count(rows, "rows", 0, MAX_ROWS)
    counts = np.zeros(rows, np.int64)
    step = max(CHUNK_IDS, rows)  # each chunk costs as much as the table has rows
    with path.open("rb") as file:
        header = _integers(path, file)
        total = math.prod(header.shape)
        if not total:
            raise FormatError(f"{path} holds no ids; give the ids that the table will be asked for")
        for at in range(0, total, step):
            ids = np.fromfile(file, header.dtype, min(step, total - at))
            if ids.min() < 0 or ids.max() >= rows:
                first = int(np.argmax((ids < 0) | (ids >= rows)))
                allowed = f"0..{rows - 1}" if rows else "an empty table"
                raise IdError(f"{path}: ids[{at + first}] = {ids[first]} is outside {allowed}")
            counts += np.bincount(ids.astype(np.int64, copy=False), minlength=rows)
    return counts


def save(folder: Folder, id_map: NDArray[np.int64]) -> None:
    """Write ``id_map.npy`` into a new folder; the folder is to be synced afterwards.

    Raises
    ------
    TableError
        If the disk is full.
    """
    array = np.ascontiguousarray(id_map, "<i8")
    header = npy.header_of(array)
    folder.write(FILE, [header, array], len(header) + array.nbytes)


def load(folder: Folder, rows: int) -> NDArray[np.int64] | None:
    """Map the id map of a table, read-only; None if it has none.

    Whether each row occurs once is not checked: that would read the whole map at every open.

    Raises
    ------
    FormatError
        If it is not an id map of so many rows.
    """
    if not folder.exists(FILE):
        return None
    with folder.open(FILE) as file:
        header = npy.read_integers(file.read_at(npy.HEAD_BYTES, 0), file.size, file.path)
        if header.dtype != np.dtype("<i8") or header.shape != (rows,):
            raise FormatError(
                f"{file.path}: {header.dtype} of shape {header.shape}; allowed: int64 of shape "
                f"({rows},), a row for each id: it is of another table; restore it from a copy"
            )
        memory = file.system.map(file.fd, header.offset + 8 * rows, mmap.ACCESS_READ)
    return np.frombuffer(memory, np.int64, rows, header.offset)


def _as_counts(counts: ArrayLike, name: str) -> NDArray[np.int64]:
    given = np.asarray(counts)
    if given.dtype.kind not in "iu" and (given.size or isinstance(counts, np.ndarray)):
        raise DTypeError(f"{name} is {given.dtype}; {ONE_EACH}; use counts.astype(np.int64)")
    if given.ndim != 1:
        raise ArgumentError(f"{name} has shape {given.shape}; allowed: (rows,), one for each id")
    if given.size and (given.min() < 0 or given.max() > MAX_COUNT):
        bad = int(np.argmax((given < 0) | (given > MAX_COUNT)))
        raise ArgumentError(f"{name}[{bad}] = {given[bad]} is outside 0..{MAX_COUNT}")
    return given.astype(np.int64, copy=False)


def _integers(path: Path, file: BinaryIO) -> npy.Header:
    """Read the header of an .npy file of integers, and seek to the first of them."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    header = npy.read_integers(file.read(npy.HEAD_BYTES), size, path)
    file.seek(header.offset)
    return header


def _parse(path: Path, file: BinaryIO) -> NDArray[np.int64]:
    counts = array("q")
    for number, line in enumerate(iter(lambda: file.readline(64), b""), 1):
        digits = line.strip()
        if not digits.isdigit() or len(digits) > 19 or int(digits) > MAX_COUNT:
            shown = line[:40].decode("utf-8", "replace").rstrip("\n")
            raise FormatError(
                f"{path}: line {number} is {shown!r}; allowed: one integer in 0..{MAX_COUNT} a "
                "line, or an .npy array of integers"
            )
        counts.append(int(digits))
    return np.frombuffer(counts, np.int64)
