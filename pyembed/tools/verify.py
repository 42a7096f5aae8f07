"""Is a table what its manifest says? Structure, and checksums, without changing anything; values if
asked."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from pyembed._progress import progress_bar
from pyembed.storage import checksums
from pyembed.table import Table

CHUNK_FLOATS = 4 << 20  # looked at at a time


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes
    ----------
    rows, generation : int
        Of the last commit.
    state : {"clean", "dirty"}
        As the manifest says. A dirty table was opened as its last commit, from its journal.
    checked_blocks : int or None
        Of 1 MiB of the rows, that have the bytes that were sealed. None if rows changed since the
        table was written, and so have no checksum; or if the table is dirty.
    nonfinite_rows : int or None
        Rows with a NaN or an infinity in any column; None if nobody looked.
    """

    rows: int
    generation: int
    state: str
    checked_blocks: int | None
    nonfinite_rows: int | None


def verify(
    path: str | os.PathLike[str], finite: bool = False, progress: bool | None = False
) -> Verdict:
    """Check a table without changing it.

    Header, sizes, manifest and its checksum, the id map's length; of a table whose writer died,
    that its journal brings it back to the last commit. Rows that did not change since the table was
    written are read whole, and compared with the checksums that were taken then.

    Parameters
    ----------
    path : path-like
    finite : bool
        Also look at every row for NaN and infinity.
    progress : bool, optional
        A bar on stderr; None shows it on a terminal.

    Raises
    ------
    FormatError, DirtyError, LockedError
        If the table is not sound. Of damaged rows it says which.
    """
    with Table.open(path, "r") as table:
        columns = [table.column(name) for name in table.columns]
        blocks = _check_seal(table, progress)
        bad = _nonfinite(columns, progress) if finite else None
        return Verdict(table.rows, table.generation, table.state, blocks, bad)


def _check_seal(table: Table, progress: bool | None) -> int | None:
    name = table.committed.seal
    if table.path is None or not name or table.state == "dirty":
        return None
    expected, file, found = checksums.load(table.path, name), table.path / "rows.npy", list[int]()
    with progress_bar("verify", expected.size, "block", progress) as bar:
        for sums in checksums.read(file):
            found += sums
            bar.update(len(sums))
    checksums.compare(file, found, expected, sum(table.columns.values()))
    return len(found)


def _nonfinite(columns: list[np.ndarray], progress: bool | None) -> int:
    rows = columns[0].shape[0]
    step = max(1, CHUNK_FLOATS // sum(column.shape[1] for column in columns))
    found = 0
    with progress_bar("verify", rows, "row", progress) as bar:
        for first in range(0, rows, step):
            sound = np.ones(min(step, rows - first), np.bool_)
            for column in columns:
                sound &= np.isfinite(column[first : first + step]).all(axis=1)
            found += int((~sound).sum())
            bar.update(sound.size)
    return found
