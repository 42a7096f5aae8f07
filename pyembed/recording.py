"""Before rows change, their old content goes into the journal, once in an interval.

This file knows the journal, which rows it holds, and when its pages should go to the disk. When
rows may change, and what a commit is, `store` knows.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyembed import _core, files
from pyembed.arrays import F32
from pyembed.journal import Journal, undo_path
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


class Recorder:
    """The journal of an open table, and the marks of the rows that are in it.

    It is not safe for threads: whoever owns it lets one in at a time.

    Parameters
    ----------
    folder : Path
    state : Manifest
        Of the table; its durability is not "none".
    threads : int
        That gather and sum rows.
    """

    def __init__(self, folder: Path, state: Manifest, threads: int) -> None:
        self._folder = folder
        self._power = state.durability == "power"
        self._journal = Journal(folder, state.stride, state.durability, threads)
        self._touched = Touched(state.rows, state.generation)
        self._threads = threads
        self._helper = ThreadPoolExecutor(1, "pyembed-journal")  # starts with its first task
        self._behind = 0  # the journal's bytes_written when its pages were last sent to the disk

    @property
    def frames(self) -> int:
        """Of this interval, the first, without rows, included."""
        return self._journal.frames

    @property
    def failed_sync(self) -> bool:
        """Whether what was recorded may be lost."""
        return self._journal.failed_sync

    def begin(self, generation: int, salt: int) -> None:
        """The interval after a commit begins; see `Journal.begin`."""
        self._journal.begin(generation, salt)

    def protect(self, array: F32, pages: _core.Pages, rows: I64) -> None:
        """Keep these rows (ascending, unique) as they were at the last commit.

        What fails leaves them unmarked, and the table sound; but for a sync, see `Journal.sync`.
        """
        rows = self._touched.new(rows)
        if not rows.size:
            return
        threads = for_work(rows.size * array.shape[1], self._threads)
        self._journal.record(rows, _Before(array, pages, rows, threads))
        if self._power:
            self._journal.sync()
        else:
            self._write_behind()
        self._touched.mark(rows)

    def _write_behind(self) -> None:
        """Send frames to the disk where the system is about to choose pages for that by itself.

        It takes the table's too, and each has to be made writable again at its next change; frames
        do not change. Where there is room they stay in memory: a commit makes them worthless.
        """
        if self._journal.bytes_written - self._behind >= BEHIND_BYTES:
            self._behind = self._journal.bytes_written
            if files.write_back_is_near():
                self._helper.submit(self._journal.start_write_back)

    def committed(self, rows: int) -> None:
        """Nothing needs the frames of this interval any more; the table has this many rows."""
        self._touched.commit(rows)

    def rolled_back(self) -> None:
        """The rows are those of the commit again."""
        self._touched.clear()

    def close(self, needed: bool) -> None:
        """Let go of the files; remove them if no recovery needs them."""
        self._helper.shutdown()
        self._journal.close()
        for number in () if needed else range(2):
            with contextlib.suppress(OSError):  # they may stay as well
                undo_path(self._folder, number).unlink()
