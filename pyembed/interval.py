"""What a writer keeps between two commits: old rows in the journal, which rows those are, and, when
they are committed, a record in the log of changes.

It knows when the journal's pages should go to the disk. When rows may change, and what a commit is,
`store` knows.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyembed import _core, files
from pyembed.arrays import F32
from pyembed.changes import Changes
from pyembed.journal import Journal
from pyembed.manifest import Manifest
from pyembed.threads import for_work
from pyembed.touched import Touched

I64 = NDArray[np.int64]
BEHIND_BYTES = 32 << 20  # of new frames, before one asks whether they should go to the disk


class _Before:
    """Rows as they are, gathered slice by slice into one buffer."""

    def __init__(self, array: F32, pages: _core.Pages, rows: I64, threads: int) -> None:
        self._whole, self._rows, self._threads = _core.Column(array, pages), rows, threads
        self._buffer = np.empty((0, array.shape[1]), np.float32)
        _core.ask_pages(self._whole, rows)

    def __getitem__(self, part: slice) -> F32:
        rows = self._rows[part]
        if rows.size > self._buffer.shape[0]:
            self._buffer = np.empty((rows.size, self._buffer.shape[1]), np.float32)
        return _core.gather(self._whole, rows, self._buffer[: rows.size], self._threads)


class Interval:
    """Of one table that is open for writing; not safe for threads.

    Parameters
    ----------
    folder : Path
    state : Manifest
        Of the table; its durability is not "none".
    threads : int
        That gather and sum old rows.

    Attributes
    ----------
    journal : Journal
    touched : Touched
    changes : Changes
    """

    def __init__(self, folder: Path, state: Manifest, threads: int) -> None:
        self.journal = Journal(folder, state.stride, state.durability, threads)
        self.touched = Touched(state.rows)
        self.changes = Changes(folder, state.durability)
        self._power = state.durability == "power"
        self._threads = threads
        self._helper = ThreadPoolExecutor(1, "pyembed-journal")  # starts with its first task
        self._behind = 0  # the journal's bytes_written when its pages were last sent to the disk

    def record(self, array: F32, pages: _core.Pages, rows: I64) -> None:
        """Write old rows, and mark them; what fails leaves them unmarked, and the table sound.

        Parameters
        ----------
        array : float32 array of shape (rows, stride)
            The mapping.
        rows : int64 array, ascending and unique
            Those that are recorded already are left out.

        Raises
        ------
        TableError
            If the disk is full.
        OSError
            If a sync failed: `Journal.failed_sync` then says so for good.
        """
        rows = self.touched.new(rows)
        if not rows.size:
            return
        threads = for_work(rows.size * array.shape[1], self._threads)
        self.journal.record(rows, _Before(array, pages, rows, threads))
        if self._power:
            self.journal.sync()
        else:
            self._write_behind()
        self.touched.mark(rows)

    def _write_behind(self) -> None:
        """Send frames to the disk where the system is about to choose pages for that by itself.

        It takes the table's too, and each has to be made writable again at its next change; frames
        do not change. Where there is room they stay in memory: a commit makes them worthless.
        """
        if self.journal.bytes_written - self._behind >= BEHIND_BYTES:
            self._behind = self.journal.bytes_written
            if files.write_back_is_near():
                self._helper.submit(self.journal.start_write_back)

    def log(self, before: Manifest, after: Manifest) -> None:
        """Before a manifest commits what was changed since the one before it."""
        self.changes.append(before, after, self.touched.parts())

    def close(self) -> None:
        """Let go of the files. What is in them stays."""
        self._helper.shutdown()
        self.journal.close()
