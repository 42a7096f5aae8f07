"""What a writer keeps between two commits: old rows in the journal, which rows those are, and, when
they are committed, a record in the log of changes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyembed import _core
from pyembed.arrays import F32
from pyembed.changes import Changes
from pyembed.journal import Journal
from pyembed.manifest import Manifest
from pyembed.touched import Touched

I64 = NDArray[np.int64]


class Interval:
    """Of one table that is open for writing; not safe for threads.

    Attributes
    ----------
    journal : Journal
    touched : Touched
    changes : Changes
    """

    def __init__(self, folder: Path, state: Manifest) -> None:
        self.journal = Journal(folder, state.stride, state.durability)
        self.touched = Touched(state.rows)
        self.changes = Changes(folder, state.durability)
        self._power = state.durability == "power"
        self._writer = ThreadPoolExecutor(1, "pyembed-journal")  # starts with its first task

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
        whole, writing = _core.Column(array, pages), None
        _core.ask_pages(whole, rows)
        try:
            for piece in self.journal.pieces(rows):  # the next is gathered while one is written
                frame = self.journal.frame(piece, _core.gather(whole, piece, None, 1))
                if writing is not None:
                    writing.result()
                writing = self._writer.submit(self.journal.write, frame)
        finally:
            if writing is not None:
                writing.result()
        if rows.size and self._power:
            self.journal.sync()
        self.touched.mark(rows)

    def log(self, before: Manifest, after: Manifest) -> None:
        """Before a manifest commits what was changed since the one before it."""
        self.changes.append(before, after, self.touched.parts())

    def close(self) -> None:
        self._writer.shutdown()
        self.journal.close()
