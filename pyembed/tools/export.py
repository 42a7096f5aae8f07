"""Copies of a table on disk, and what changed between two commits, to bring a copy forward.

::

    export(table, "copy")                    a table: the same commit, sealed
    export(table, "delta", since=3)          rows that may differ from generation 3, as a folder
    apply("delta", "copy")                   copy: generation 3 ──► that of the table

    delta/  delta.json   from which generation to which commit; meta, optimizer state, checksums
            changes      which rows, see changes.py
            rows.npy     these rows, whole, in that order
            seal.npy     checksums of rows.npy, see seal.py

For a backup that does not copy everything each time, and for a copy that others read. A delta leads
from one commit to another and fits no other table: commits have numbers of their own, drawn at
random. It is checked whole before a row of the copy changes, and put there through the journal of
the copy, so that a copy is always at one of its commits. What lies beside the rows (a vocabulary,
an id map) goes along with a whole copy.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pyembed._checks import F32, require_count
from pyembed._progress import progress_bar
from pyembed.errors import ArgumentError, FormatError, TableError
from pyembed.storage import checksums, create, fs
from pyembed.storage.change_log import Since, commit_of
from pyembed.storage.columns import CHUNK_FLOATS
from pyembed.storage.manifest import Delta, decode_delta, encode_delta
from pyembed.storage.store import Store
from pyembed.table import Table
from pyembed.tools.convert import copied_rows, copy_files, open_committed

FILE = "delta.json"

I64 = NDArray[np.int64]


def export(
    table: Table | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    since: int | None = None,
    progress: bool | None = False,
) -> None:
    """Copy the last commit of a table, or what changed since an earlier one.

    Parameters
    ----------
    table : Table or path-like
        On disk. One that is open for writing must be committed; who wants to change it meanwhile,
        waits.
    output : path-like
        A folder that must not exist. It appears complete or not at all.
    since : int, optional
        A generation: the rows whose content may differ from it, for `apply`. How many generations
        back are known depends on the number of commits (the last 65,536 at most), and on whether
        the table kept a journal all the time.
    progress : bool or None
        Show a bar; None shows it when stderr is a terminal.

    Raises
    ------
    FileExistsError
    ArgumentError
        If the table has changes that are not committed, or it is not known what changed since.
    FormatError
        If rows of a sealed table are damaged.
    TableError, LockedError, DirtyError

    Examples
    --------
    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> table = Table.create(folder / "a", rows=3, dim=2)
    >>> export(table, folder / "copy")
    >>> table.append(2)
    >>> table.commit()
    >>> export(table, folder / "delta", since=0)
    >>> apply(folder / "delta", folder / "copy")
    True
    >>> with Table.open(folder / "copy") as copy:
    ...     copy.rows, copy.generation
    (5, 1)
    """
    target = Path(output)
    if since is not None:
        since = require_count(since, "since", 0, 2**63)
    with _still(table) as t:
        if since is None:
            _copy(t, target, progress)
        else:
            _write_delta(t, target, since, progress)


@contextlib.contextmanager
def _still(table: Table | str | os.PathLike[str]) -> Iterator[Table]:
    """The table's file opened to be read, at a commit; nobody changes it meanwhile."""
    if not isinstance(table, Table):
        with open_committed(table) as opened:
            yield _require_folder(opened)
        return
    _ = table.weight_column  # of a closed one there is none
    if table.path is None:
        raise ArgumentError("a table in memory has no file to copy; use Table.create")
    with table.still(), Table.open(table.path, "r", live=True) as opened:
        if opened.state != "clean":
            raise ArgumentError(f"{table.path} has changes that are not committed; commit them")
        yield _require_folder(opened)


def _require_folder(table: Table) -> Table:
    if table.path is None or not table.path.is_dir():
        raise ArgumentError(f"{table.path} has no commits; copy the file, or use pyembed convert")
    return table


def _copy(t: Table, target: Path, progress: bool | None) -> None:
    state, source = t.committed, Path(str(t.path))

    def finish(folder: Path) -> None:
        copy_files(source, folder)
        if state.seal:  # damage is not sealed anew
            found = np.load(folder / checksums.FILE)
            checksums.compare(
                source / "rows.npy", found, checksums.load(source, state.seal), state.stride
            )

    with progress_bar("export", t.nbytes, "B", progress) as bar:
        rows = copied_rows(source / "rows.npy", t, state.columns, bar)
        same = ("meta", "optimizer", "generation", "commit")
        carried = {name: getattr(state, name) for name in same}
        create.create(target, state.columns, rows, state.rows, finish, state.durability, carried)


# --- deltas ---------------------------------------------------------------------------------------


def _write_delta(t: Table, target: Path, since: int, progress: bool | None) -> None:
    state = t.committed
    found = Since(Path(str(t.path)), state, since)
    with (
        progress_bar("export", state.rows, "row", progress) as bar,
        create.appearing(target) as folder,
    ):
        rows = _rows_at(t, found, bar)
        count, name = create.write_rows(folder, state.stride, rows, None)
        found.save(folder)
        delta = Delta(since, count, name, state)
        fs.replace_file(folder / FILE, [encode_delta(delta)])


def _pieces(found: Since, stride: int) -> Iterator[I64]:
    step = max(1, CHUNK_FLOATS // stride)
    for rows in found.rows():
        for first in range(0, rows.size, step):
            yield rows[first : first + step]


def _rows_at(t: Table, found: Since, bar: tqdm[Any]) -> Iterator[F32]:
    for rows in _pieces(found, t.committed.stride):
        t.prefetch(rows)
        yield np.concatenate([t.column(name)[rows] for name in t.columns], axis=1)
        bar.update(int(rows[-1]) + 1 - bar.n)


def read_delta(path: str | os.PathLike[str]) -> Delta:
    """What a delta says of itself.

    Raises
    ------
    FormatError
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

    Rows, state, meta and generation are then those of the table that the delta is of. If this
    process dies amid it, the next to open the copy finds it as it was; one with durability "none"
    is refused then.

    Parameters
    ----------
    delta : path-like
        A folder that `export` made.
    table : path-like
        A copy at the very commit that the delta goes on from.
    progress : bool or None
        Show a bar; None shows it when stderr is a terminal.

    Returns
    -------
    bool
        False if the copy is there already; nothing is done then.

    Raises
    ------
    FormatError
        If the delta is damaged; no row of the copy has changed.
    TableError
        If the delta does not go on from the commit of the copy.
    LockedError, DirtyError
    """
    folder, said = Path(delta), read_delta(delta)
    copy = Store(Path(table), "r+")
    try:
        if commit_of(copy.manifest) == commit_of(said.table):
            return False
        found = _require_next(folder, said, copy)
        try:
            with progress_bar("apply", said.count, "row", progress) as bar:
                _put(folder, said, found, copy, bar)
        except BaseException:
            if copy.keeps_journal:
                with contextlib.suppress(OSError):  # then the next to open it does it
                    copy.rollback()
            raise
    finally:
        copy.release()
    return True


def _require_next(folder: Path, delta: Delta, copy: Store) -> Since:
    """Which rows the delta has, once it is known that it is whole and fits."""
    to, state = delta.table, copy.manifest
    try:
        found = Since(folder, to, delta.since)
    except ArgumentError as error:
        raise FormatError(f"{folder}: the row numbers are damaged ({error})") from None
    if commit_of(state) != found.commit:
        what = f"it is at generation {state.generation}"
        if state.generation in (delta.since, to.generation):
            what += ", but of another table, or it went on by itself"
        raise TableError(
            errno.EINVAL,
            f"{what}; {folder} leads from generation {delta.since} to {to.generation}: apply those "
            "between, or copy the whole table",
            str(copy.path),
        )
    file = folder / "rows.npy"
    with file.open("rb") as opened:
        shape = fs.read_npy_header(file, opened.fileno())
    if shape != (delta.count, to.stride, fs.HEADER_BYTES):
        raise FormatError(f"{file}: {shape[0]} rows of {shape[1]} floats; expected {delta.count}")
    sums = [each for some in checksums.read(file) for each in some]
    checksums.compare(file, sums, checksums.load(folder, delta.seal), to.stride)
    try:
        count = sum(rows.size for rows in found.rows())
    except ArgumentError as error:
        raise FormatError(str(error)) from None
    if count != delta.count or not found.rows_before <= state.rows <= to.rows:
        raise FormatError(f"{folder}: it names {count} rows and has {delta.count}")
    return found


def _put(folder: Path, delta: Delta, found: Since, copy: Store, bar: tqdm[Any]) -> None:
    to, old = delta.table, copy.manifest.rows
    with (folder / "rows.npy").open("rb") as file:
        file.seek(fs.HEADER_BYTES)
        for rows in _pieces(found, to.stride):
            rows = rows[: np.searchsorted(rows, old)]
            if not rows.size:
                break
            copy.protect(rows)
            copy.array[rows] = _floats(file, rows.size, to.stride)
            bar.update(rows.size)
        if to.rows > old:  # the last rows of the delta
            file.seek(fs.HEADER_BYTES + 4 * to.stride * (delta.count - (to.rows - old)))
            step = max(1, CHUNK_FLOATS // to.stride)
            left = [min(step, to.rows - first) for first in range(old, to.rows, step)]
            copy.append(map(partial(_floats, file, stride=to.stride), left), to.rows - old)
    copy.commit_as(generation=to.generation, commit=to.commit, meta=to.meta, optimizer=to.optimizer)


def _floats(file: BinaryIO, rows: int, stride: int) -> F32:
    values = np.fromfile(file, "<f4", rows * stride)
    if values.size != rows * stride:
        raise FormatError(f"{file.name}: it ends too early; was it cut short?")
    return values.reshape(rows, stride)
