"""Which row each id has, when the ids that occur most often shall lie together.

Ids in the order of a data set are spread over the whole table, so every page holds a hot row or two
beside many cold ones. Laid out by frequency, the hot rows share pages, and few pages hold most of
what a batch needs.

The result is an id map, ``id_map[id] = row``, kept as ``id_map.npy`` beside the rows. This file
makes it from counts, and knows its bytes; `store` maps them. It moves no values: what a row holds
belongs to the row, whichever id has it.

Counts and ids are taken as they are or refused: nothing is clipped, rounded or filled up.
"""

from __future__ import annotations

import math
import os
from array import array
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import ArrayLike, NDArray

from pyembed._checks import require_count
from pyembed.errors import ArgumentError, DTypeError, FormatError, IdError, PyembedError
from pyembed.storage import fs
from pyembed.storage.manifest import MAX_ROWS

__all__ = ["by_frequency", "count_ids", "read_counts"]

FILE = "id_map.npy"
MAX_COUNT = np.iinfo(np.int64).max
CHUNK_IDS = 1 << 20  # ids read at a time, at least: 8 MB
ONE_EACH = "allowed: integers of 0 or more, one for each id"


def by_frequency(counts: ArrayLike, rows: int | None = None) -> NDArray[np.int64]:
    """Give each id its row: the most frequent id row 0; of equally frequent ids the smaller first.

    Takes about 32 bytes of memory an id while it sorts, counts and result included.

    Parameters
    ----------
    counts : integers of shape (rows,)
        How often each id occurs.
    rows : int, optional
        How many there must be.

    Returns
    -------
    int64 array of shape (rows,)
        ``id_map[id] = row``, each row once.

    Raises
    ------
    ArgumentError, DTypeError

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
    """Read how often each id occurs; 8 bytes of memory an id.

    Parameters
    ----------
    path : path-like
        A 1-D .npy array of integers, or a text with one integer a line: id 0 first.

    Raises
    ------
    FormatError
        Naming the line or element.
    """
    path = Path(path)
    with path.open("rb") as file:
        if file.read(6) == npy.MAGIC_PREFIX:
            file.seek(0)
            shape, dtype = _integers(path, file)
            if len(shape) != 1:
                raise FormatError(f"{path}: shape {shape}; allowed: one dimension, a count an id")
            counts = np.fromfile(file, dtype)[: shape[0]]
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
    """Count the ids of a stream that may be larger than memory.

    Takes about 28 bytes of memory a row, and 20 MB at least, however long the stream is.

    Parameters
    ----------
    path : path-like
        An .npy array of ids, of any shape and integer dtype.
    rows : int
        How many rows the table has: ids are 0..rows-1.

    Returns
    -------
    int64 array of shape (rows,)

    Raises
    ------
    FormatError
        If the file is something else, or holds no ids.
    IdError
        Naming the first id that the table has no row for.
    """
    path, rows = Path(path), require_count(rows, "rows", 0, MAX_ROWS)
    counts = np.zeros(rows, np.int64)
    step = max(CHUNK_IDS, rows)  # each chunk costs as much as the table has rows
    with path.open("rb") as file:
        shape, dtype = _integers(path, file)
        total = math.prod(shape)
        if not total:
            raise FormatError(f"{path} holds no ids; give the ids that the table will be asked for")
        for at in range(0, total, step):
            ids = np.fromfile(file, dtype, min(step, total - at))
            if ids.min() < 0 or ids.max() >= rows:
                first = int(np.argmax((ids < 0) | (ids >= rows)))
                allowed = f"0..{rows - 1}" if rows else "an empty table"
                raise IdError(f"{path}: ids[{at + first}] = {ids[first]} is outside {allowed}")
            counts += np.bincount(ids.astype(np.int64, copy=False), minlength=rows)
    return counts


def save(folder: Path, id_map: NDArray[np.int64]) -> None:
    """Write ``id_map.npy`` into a folder that has none, durably.

    Raises
    ------
    TableError
        If the disk is full.
    """
    header = BytesIO()
    npy.write_array_header_1_0(
        header, {"descr": "<i8", "fortran_order": False, "shape": id_map.shape}
    )
    path = folder / FILE
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        fs.allocate(fd, 0, header.tell() + id_map.nbytes, path)
        fs.write_all(fd, header.getvalue())
        if id_map.size:
            fs.write_all(fd, id_map.astype("<i8", copy=False))
        fs.sync(fd)
    finally:
        os.close(fd)


def data_offset(path: Path, fd: int, rows: int) -> int:
    """Where the numbers of an id map begin, once it is known to fit a table of so many rows.

    That each row comes once is not looked at: it would read the whole map at every open.

    Raises
    ------
    FormatError
    """
    with open(fd, "rb", closefd=False) as file:
        shape, dtype = _integers(path, file)
        if dtype != np.dtype("<i8") or shape != (rows,):
            raise FormatError(
                f"{path}: {dtype} of shape {shape}; allowed: int64 of shape ({rows},), a row for "
                "each id: it is of another table; restore it from a copy"
            )
        return file.tell()


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


def _integers(path: Path, file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an .npy file of integers; the file then stands at the first of them."""
    try:
        version = npy.read_magic(file)
        v1, v2 = npy.read_array_header_1_0, npy.read_array_header_2_0
        shape, _, dtype = (v1 if version == (1, 0) else v2)(file)
    except Exception as error:  # numpy evaluates the header as Python: anything can come of it
        raise FormatError(f"{path}: not an .npy file ({error}); save it with np.save") from None
    if dtype.kind not in "iu" or min(shape, default=0) < 0:
        raise FormatError(f"{path}: {dtype} of shape {shape}; allowed: an array of integers")
    size, needed = os.fstat(file.fileno()).st_size, file.tell() + dtype.itemsize * math.prod(shape)
    if size < needed:
        raise FormatError(f"{path}: {size} bytes; its header asks for {needed}: it was cut short")
    return shape, dtype


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
