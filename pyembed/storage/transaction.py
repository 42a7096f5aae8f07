"""What a writer keeps between two commits: old rows in the journal, which rows those are, and, when
they are committed, a record in the log of changes.

It knows when the journal's pages should go to the disk, and has a helper thread for what nobody
should wait for. When rows may change, and what a commit is, `store` knows.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pyembed import _core, grouping
from pyembed._checks import F32, IdArray
from pyembed._threads import for_work
from pyembed.storage import page_cache
from pyembed.storage.change_log import ChangeLog
from pyembed.storage.dirty_rows import DirtyRows
from pyembed.storage.fs import Folder
from pyembed.storage.journal import Journal
from pyembed.storage.manifest import Manifest

I64 = NDArray[np.int64]
MAX_ASKED = 64  # batches that wait to be written ahead; a step sees to what is older itself
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
    """Of one table that is open for writing; not safe for threads, but for `ask` and `asked`.

    Parameters
    ----------
    folder : Folder
    state : Manifest
        Of the table; its durability is not "none".

    Attributes
    ----------
    journal : Journal
    dirty_rows : DirtyRows
    change_log : ChangeLog
    power : bool
        Whether what is recorded is synced, too.
    """

    # The crash suite puts broken parts here, which it then has to notice.
    dirty_rows_type: type[DirtyRows] = DirtyRows
    change_log_type: type[ChangeLog] = ChangeLog

    def __init__(self, folder: Folder, state: Manifest) -> None:
        self.journal = Journal(folder, state.stride, state.durability)
        self.dirty_rows = self.dirty_rows_type(state.rows)
        self.change_log = self.change_log_type(folder, state.durability)
        self.power = state.durability == "power"
        self._asked = deque[IdArray](maxlen=MAX_ASKED)
        self._helper = folder.system.helper("pyembed-journal", 1)  # starts with its first task
        self._behind = 0  # the journal's bytes_written when its pages were last sent to the disk

    def record(self, array: F32, pages: _core.Pages, rows: I64, threads: int) -> None:
        """Write old rows, and mark them; what fails leaves them unmarked, and the table sound.

        Parameters
        ----------
        array : float32 array of shape (rows, stride)
            The mapping.
        rows : int64 array, ascending and unique
            Those that are recorded already are left out.
        threads : int
            That may gather and sum them.

        Raises
        ------
        TableError
            If the disk is full.
        OSError
            If a sync failed: `Journal.failed_sync` then says so for good.
        """
        rows = self.dirty_rows.new(rows)
        if not rows.size:
            return
        threads = for_work(rows.size * array.shape[1], threads)
        self.journal.record(rows, _Before(array, pages, rows, threads), threads)
        if self.power:
            self.journal.sync()
        else:
            self._write_behind()
        self.dirty_rows.mark(rows)

    def _write_behind(self) -> None:
        """Send frames to the disk where the system is about to choose pages for that by itself.

        It takes the table's too, and each has to be made writable again at its next change; frames
        do not change. Where there is room they stay in memory: a commit makes them worthless.
        """
        if self.journal.bytes_written - self._behind >= BEHIND_BYTES:
            self._behind = self.journal.bytes_written
            if page_cache.write_back_is_near():
                self._helper.submit(self.journal.start_write_back)

    def ask(self, ids: IdArray, record: Callable[[Interval], None], owner: object) -> None:
        """Have the helper call `record`, which finds copies of these ids in `asked`.

        What it raises is nobody's error: whoever needs these rows meets it again. The owner of the
        table is kept until then: where the last of it goes, the table is committed and closed, and
        a garbage collection may see to that in any thread, also in the middle of `record`.
        """
        self._asked.append(ids.flatten())
        with contextlib.suppress(RuntimeError):  # at the end of a process no thread is to be had
            self._helper.submit(lambda owner: record(self), owner)

    def asked(self, rows: int) -> I64:
        """The rows, ascending and unique, that were asked for since this was called last."""
        some = [self._asked.popleft() for _ in range(len(self._asked))]
        return grouping.group(np.concatenate([*some, np.zeros(0, np.int64)]), rows, 1).rows

    def log(self, before: Manifest, after: Manifest) -> None:
        """Before a manifest commits what was changed since the one before it."""
        self.change_log.append(before, after, self.dirty_rows.parts())

    def close(self) -> None:
        """Let go of the files. What is in them stays.

        It does not wait for the helper, which may be who closes. What that is late with finds
        nothing to write to.
        """
        self._helper.shutdown(wait=False, cancel_futures=True)
        self.journal.close()
