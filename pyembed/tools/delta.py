"""A delta: the rows that changed from one commit of a table to a later one, in a folder of files.

::

    delta/  delta.json   from which generation, to which commit; meta, optimizer state, checksums
            changes      the row numbers, see `pyembed.storage.change_log`
            rows.npy     these rows, whole, in that order
            seal.npy     checksums of rows.npy, see `pyembed.storage.checksums`

A delta fits no other table, because each commit has a random number of its own. It is checked
whole before a row of the copy changes, and applied through the journal of the copy. Therefore a
copy is always at one of the table's commits.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pyembed import _threads
from pyembed._checks import F32
from pyembed._progress import progress_bar
from pyembed.errors import ArgumentError, FormatError, TableError
from pyembed.storage import checksums, create, npy
from pyembed.storage.change_log import ChangedRows, commit_of
from pyembed.storage.columns import CHUNK_FLOATS
from pyembed.storage.file_store import Writer, open_store
from pyembed.storage.fs import Folder
from pyembed.storage.manifest import Delta, decode_delta, encode_delta
from pyembed.storage.store import NO_STATE
from pyembed.table import Table
from pyembed.tools.convert import fill_rows

FILE = "delta.json"

I64 = NDArray[np.int64]


def write_delta(t: Table, target: Path, since: int, progress: bool | None) -> None:
    """Write the rows of a table that may differ from generation `since` into a new folder.

    Raises
    ------
    ArgumentError
        If the change log does not reach back to `since`.
    """
    state = t.committed
    with Folder(Path(str(t.path))) as source:
        found = ChangedRows(source, state, since)
        with (
            progress_bar("export", state.rows, "row", progress) as bar,
            create.appearing(target) as folder,
        ):
            rows = _rows_at(t, found, bar)
            count, name = create.write_rows(folder, state.stride, rows, None)
            found.save(folder)
            delta = Delta(since, count, name, state)
            folder.replace(FILE, [encode_delta(delta)])


def _pieces(found: ChangedRows, stride: int) -> Iterator[I64]:
    """Yield the row numbers of a delta, a few megabytes of rows at a time."""
    step = max(1, CHUNK_FLOATS // stride)
    for rows in found.rows():
        for first in range(0, rows.size, step):
            yield rows[first : first + step]


def _rows_at(t: Table, found: ChangedRows, bar: tqdm[Any]) -> Iterator[F32]:
    for rows in _pieces(found, t.committed.stride):
        t.prefetch(rows)
        yield np.concatenate([t.column(name)[rows] for name in t.columns], axis=1)
        bar.update(int(rows[-1]) + 1 - bar.n)


def read_delta(path: str | os.PathLike[str]) -> Delta:
    """Read the description of a delta: its generations, and the commit that it leads to.

    Parameters
    ----------
    path : path-like
        A folder that `export` made.

    Returns
    -------
    Delta
        The description.

    Raises
    ------
    FileNotFoundError
        If the folder is no delta.
    FormatError
        If the description is damaged.
    """
    file = Path(path) / FILE
    return decode_delta(file.read_bytes(), str(file))


def apply(
    delta: str | os.PathLike[str],
    table: str | os.PathLike[str],
    *,
    progress: bool | None = False,
) -> bool:
    """Bring a copy forward to the commit that a delta leads to.

    Rows, optimizer state, meta and generation are then those of the exported table. If this
    process dies before the end, the next writer that opens the copy rolls it back; a copy with
    durability "none" is refused then.

    Parameters
    ----------
    delta : path-like
        A folder that `export` made.
    table : path-like
        A copy at the commit that the delta starts from.
    progress : bool or None
        Whether a bar is drawn on stderr; None draws it if stderr is a terminal.

    Returns
    -------
    bool
        False if the copy is at the delta's last commit already; nothing is done then.

    Raises
    ------
    FormatError
        If the delta is damaged; no row of the copy has changed.
    TableError
        If the delta does not start from the commit of the copy.
    LockedError, DirtyError
        If the copy cannot be opened for writing.
    """
    described = read_delta(delta)
    copy = open_store(Path(table), "r+", num_threads=_threads.resolve(None))
    assert isinstance(copy, Writer)
    try:
        if commit_of(copy.manifest) == commit_of(described.table):
            return False
        try:
            with Folder(Path(delta)) as folder:
                found = _require_next(folder, described, copy)
                with progress_bar("apply", described.count, "row", progress) as bar:
                    _write(folder.path, described, found, copy, bar)
        except BaseException:
            if copy.keeps_journal:
                with contextlib.suppress(OSError):  # the next writer to open it rolls it back
                    copy.rollback()
            raise
    finally:
        copy.release()
    return True


def _require_next(folder: Folder, delta: Delta, copy: Writer) -> ChangedRows:
    """Check a delta whole, and that it starts from the commit of the copy; return its rows."""
    to, state = delta.table, copy.manifest
    try:
        found = ChangedRows(folder, to, delta.since)
    except ArgumentError as error:
        raise FormatError(f"{folder.path}: the row numbers are damaged ({error})") from None
    if commit_of(state) != found.commit:
        what = f"it is at generation {state.generation}"
        if state.generation in (delta.since, to.generation):
            what += ", but of another table, or it has commits of its own"
        raise TableError(
            errno.EINVAL,
            f"{what}; {folder.path} leads from generation {delta.since} to {to.generation}: apply "
            "the deltas between, or copy the whole table",
            str(copy.path),
        )
    with folder.open("rows.npy") as file:
        shape = npy.read_rows(file.read_at(npy.HEAD_BYTES, 0), file.size, file.path)
        if shape != (delta.count, to.stride, npy.HEADER_BYTES):
            what = f"{shape[0]} rows of {shape[1]} floats; expected {delta.count}"
            raise FormatError(f"{file.path}: {what}")
        sums = [each for some in checksums.read(file) for each in some]
        checksums.compare(file, sums, checksums.load(folder, delta.seal), to.stride)
    try:
        count = sum(rows.size for rows in found.rows())
    except ArgumentError as error:
        raise FormatError(str(error)) from None
    if count != delta.count or not found.rows_before <= state.rows <= to.rows:
        raise FormatError(f"{folder.path}: it names {count} rows and has {delta.count}")
    return found


def _write(folder: Path, delta: Delta, found: ChangedRows, copy: Writer, bar: tqdm[Any]) -> None:
    """Write the changed rows, append the new ones, and commit under the delta's numbers."""
    to, old = delta.table, copy.manifest.rows
    with (folder / "rows.npy").open("rb") as file:
        file.seek(npy.HEADER_BYTES)
        for rows in _pieces(found, to.stride):
            rows = rows[: np.searchsorted(rows, old)]
            if not rows.size:
                break
            copy.begin_change(NO_STATE, rows)
            copy.array[rows] = fill_rows(file, np.empty((rows.size, to.stride), np.float32))
            bar.update(rows.size)
        if to.rows > old:  # the new rows are the last ones of the delta
            file.seek(npy.HEADER_BYTES + 4 * to.stride * (delta.count - (to.rows - old)))
            step = max(1, CHUNK_FLOATS // to.stride)
            sizes = (min(step, to.rows - first) for first in range(old, to.rows, step))
            empty = (np.empty((size, to.stride), np.float32) for size in sizes)
            copy.append_chunks((fill_rows(file, rows) for rows in empty), to.rows - old)
    copy.commit_as(to.generation, to.commit, to.meta, to.optimizer)
