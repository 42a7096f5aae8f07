"""Check that a table is what its manifest says, without changing it.

Structure and checksums are checked always, values on request.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from pyembed._checks import F32
from pyembed._progress import progress_bar
from pyembed.storage import checksums
from pyembed.storage.fs import Folder
from pyembed.table import Table

CHUNK_FLOATS = 4 << 20  # checked for NaN and infinity at a time


@dataclass(frozen=True)
class Verified:
    """The result of `verify`.

    Attributes
    ----------
    rows, generation : int
        The size and the number of the last commit.
    state : {"clean", "dirty"}
        The state in the manifest. A dirty table was read as its last commit, from its journal.
    checked_blocks : int or None
        The number of blocks of 1 MiB of rows whose checksum is right. None if there are no
        checksums, because rows changed since the table was written or the table is dirty.
    nonfinite_rows : int or None
        Rows with a NaN or an infinity in any column; None if `finite` was not asked for.
    """

    rows: int
    generation: int
    state: str
    checked_blocks: int | None
    nonfinite_rows: int | None


def verify(
    path: str | os.PathLike[str], finite: bool = False, progress: bool | None = False
) -> Verified:
    """Check a table without changing it.

    It checks the header of the rows, all sizes, the manifest and its checksum, and the length of
    the id map. If the writer of the table died, it checks that the journal leads back to the last
    commit. If no rows changed since the table was written, all rows are compared with their
    checksums.

    Parameters
    ----------
    path : path-like
        A table, or a bare .npy of float32 rows.
    finite : bool
        Whether to look for NaN and infinity in every row, too.
    progress : bool or None
        Whether a bar is drawn on stderr; None draws it if stderr is a terminal.

    Returns
    -------
    Verified
        What was checked and found.

    Raises
    ------
    FormatError
        If the table is damaged; the message names damaged rows.
    DirtyError
        If the last writer ended without a commit, and there is no journal to go back.
    LockedError
        If a writer has the table open.
    """
    with Table.open(path, "r") as table:
        columns = [table.column(name) for name in table.columns]
        blocks = _check_blocks(table, progress)
        nonfinite = _nonfinite(columns, progress) if finite else None
        return Verified(table.rows, table.generation, table.state, blocks, nonfinite)


def _check_blocks(table: Table, progress: bool | None) -> int | None:
    name = table.committed.seal
    if table.path is None or not name or table.state == "dirty":
        return None
    found = list[int]()
    with Folder(table.path) as folder, folder.open("rows.npy") as file:
        expected = checksums.load(folder, name)
        with progress_bar("verify", expected.size, "block", progress) as bar:
            for sums in checksums.read(file):
                found += sums
                bar.update(len(sums))
        checksums.compare(file, found, expected, sum(table.columns.values()))
    return len(found)


def _nonfinite(columns: list[F32], progress: bool | None) -> int:
    rows = columns[0].shape[0]
    step = max(1, CHUNK_FLOATS // sum(column.shape[1] for column in columns))
    found = 0
    with progress_bar("verify", rows, "row", progress) as bar:
        for first in range(0, rows, step):
            finite = np.ones(min(step, rows - first), np.bool_)
            for column in columns:
                finite &= np.isfinite(column[first : first + step]).all(axis=1)
            found += int((~finite).sum())
            bar.update(finite.size)
    return found
