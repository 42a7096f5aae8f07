"""Copies of a table on disk: a whole commit, or the rows that changed since an earlier one.

::

    export(table, "copy")                    a table: the same commit, with checksums
    export(table, "delta", since=3)          the rows that may differ from generation 3, as a folder
    apply("delta", "copy")                   copy: generation 3 ──► that of the table

Use it for incremental backups, and for copies that other processes read. `pyembed.tools.delta`
defines the files of a delta. A whole copy includes the vocabulary and the id map; a delta does not.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pyembed._checks import require_count
from pyembed._progress import progress_bar
from pyembed.errors import ArgumentError
from pyembed.storage import checksums, create
from pyembed.storage.fs import Folder
from pyembed.table import Table
from pyembed.tools.convert import copied_rows, copy_files, open_committed
from pyembed.tools.delta import apply, read_delta, write_delta

__all__ = ["apply", "export", "read_delta"]


def export(
    table: Table | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    since: int | None = None,
    progress: bool | None = False,
) -> None:
    """Copy the last commit of a table, or the rows that changed since an earlier one.

    Parameters
    ----------
    table : Table or path-like
        A table on disk. One that is open for writing must have no uncommitted changes; calls that
        would change it wait until the copy is made.
    output : path-like
        The folder to make; it must not exist. It appears complete or not at all.
    since : int, optional
        A generation. The output is then a delta for `apply`, with the rows whose content may
        differ from that generation. The change log knows the last 65,536 commits at most, and
        none before one that was made without a journal.
    progress : bool or None
        Whether a bar is drawn on stderr; None draws it if stderr is a terminal.

    Raises
    ------
    FileExistsError
        If something has the name `output` already.
    ArgumentError
        If the table has uncommitted changes or is no folder, or if the change log does not reach
        back to `since`.
    FormatError
        If rows do not have the checksums that were taken when they were written.
    TableError, LockedError, DirtyError
        If the table cannot be opened.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> a, copy, delta = (pathlib.Path(folder.name, name) for name in ("a", "copy", "delta"))
    >>> with Table.create(a, rows=3, dim=2) as table:
    ...     export(table, copy)
    ...     table.append(2)
    ...     table.commit()
    ...     export(table, delta, since=0)
    >>> apply(delta, copy)
    True
    >>> with Table.open(copy) as table:
    ...     table.rows, table.generation
    (5, 1)
    >>> folder.cleanup()
    """
    target = Path(output)
    if since is not None:
        since = require_count(since, "since", 0, 2**63)
    with _unchanging(table) as t:
        if since is None:
            _copy(t, target, progress)
        else:
            write_delta(t, target, since, progress)


@contextlib.contextmanager
def _unchanging(table: Table | str | os.PathLike[str]) -> Iterator[Table]:
    """Open a table's last commit for reading; no call changes it until the block ends."""
    if not isinstance(table, Table):
        with open_committed(table) as opened:
            yield _require_folder(opened)
        return
    _ = table.store.weight_column  # raises ClosedError on a closed table
    if table.path is None:
        raise ArgumentError("a table in memory has no file to copy; use Table.create")
    table.store.location()  # raises TableError if the path leads to another folder now
    with table.store.still(), Table.open(table.path, "r", live=True) as opened:
        if opened.state != "clean":
            raise ArgumentError(f"{table.path} has uncommitted changes; commit them first")
        yield _require_folder(opened)


def _require_folder(table: Table) -> Table:
    if table.path is None or not table.path.is_dir():
        raise ArgumentError(f"{table.path} has no commits; copy the file, or use pyembed convert")
    return table


def _copy(t: Table, target: Path, progress: bool | None) -> None:
    state, source = t.committed, Path(str(t.path))

    def finish(folder: Folder) -> None:
        copy_files(source, folder.path)
        if state.seal:  # damaged rows must not get fresh checksums
            found = np.load(folder.path / checksums.FILE)
            with Folder(source) as held, held.open("rows.npy") as file:
                checksums.compare(file, found, checksums.load(held, state.seal), state.stride)

    with progress_bar("export", t.nbytes, "B", progress) as bar:
        rows = copied_rows(source / "rows.npy", t, state.columns, bar)
        same = ("meta", "optimizer", "generation", "commit")
        carried = {name: getattr(state, name) for name in same}
        create.create(target, state.columns, rows, state.rows, finish, state.durability, carried)
