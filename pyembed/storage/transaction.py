"""The transaction of a writer: everything it keeps between two commits.

::

                  ┌─────────────── commit, rollback ──────────────┐
                  ▼                                               │
    open ──────► CLEAN ─────────────── protect ───────────────► DIRTY
                  │  ╲                                          ╱  │
                  │   ╲ a sync, a manifest or a rollback failed╱   │
                  │    ╲───────────► POISONED ◄───────────────╱    │
                  ├── close              │ close                   ├── close without a commit
                  ▼                      ▼                         ▼
                CLOSED                 CLOSED                    CLOSED, dirty on the disk

========= ================================== =====================================================
state     entered by                         left by
========= ================================== =====================================================
absent    —                                  `create.create`: the table is clean
clean     open (a dirty table is recovered   `protect`: the first change after a commit
          first), `commit`, `rollback`
dirty     `protect`                          `commit`: one generation on; `rollback`; if the
                                             process dies, the next writer recovers at open
poisoned  a failed or interrupted sync, a    `close` alone, which commits nothing; to open the
          failed manifest, half a rollback   table again recovers it
forked    any use in a child process         never: the child may only read and close
closed    `close`                            never
========= ================================== =====================================================

A change, in this order; each line returns before the next begins::

    protect   the first after a commit: the files must still be those of the folder; the journal
              begins (frame 0); then the manifest says dirty
              rows that are not marked since the commit: the journal records their old content
              with durability "power": the journal is synced
              they are marked (with "power" the helper may have done so since `write_ahead`)
    kernel    rows change

    commit    the change log records which rows changed (with "power" synced); rows are synced;
              then the manifest says clean, with the next generation: from here on no frame of the
              journal belongs to a transaction, as the next one has another salt
    rollback  the journal is read whole and judged; its rows are put back; rows are synced; then
              the manifest says clean. Recovery at open is the same

The durability of a table is its promise. "process": whenever the writing process dies, the next
writer finds the last commit, bit for bit. "power": the same if the machine dies. "none": there is
no journal, and a table whose writer died with uncommitted changes is refused.

1. No row changes before its old content is as safe as the table's durability promises.
2. Rows are synced before the manifest that commits them.
3. A dirty manifest describes the last commit; rows that were appended since come after its rows,
   and a rollback cuts them off.
4. From the look at the marks until they are set no other thread records, and no transaction begins
   or ends (`_turn`); one begins without marks. So a marked row is in the journal of this
   transaction. Its frame has the content of the commit, because a row without a mark has not
   changed: a row changes after `protect` returned, and no transaction ends between the two
   (`store.Turns`).
5. In the state poisoned nothing is called committed any more: the content of the disk is unknown.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from pyembed import _core, grouping
from pyembed._checks import F32, IdArray
from pyembed._threads import for_work
from pyembed.errors import ArgumentError, ReadOnlyError, TableError
from pyembed.storage import page_cache, recovery
from pyembed.storage.change_log import ChangeLog
from pyembed.storage.dirty_rows import DirtyRows
from pyembed.storage.fs import PASSING
from pyembed.storage.journal import Journal
from pyembed.storage.manifest import Manifest
from pyembed.storage.table_files import BareFile, TableFolder

I64 = NDArray[np.int64]
MAX_AHEAD = 64  # batches that wait to be written ahead; a step records the rows of older ones
BEHIND_BYTES = 32 << 20  # bytes of new frames between two calls of `write_back_is_near`


class Transaction:
    """The transaction of a table without a journal: it notes that rows changed.

    Parameters
    ----------
    files : BareFile or TableFolder
        Open for writing, and clean.

    Attributes
    ----------
    keeps_journal : bool
    """

    keeps_journal = False

    def __init__(self, files: BareFile) -> None:
        self._files = files
        self._draw = files.file.system.token
        self._pid = os.getpid()
        self._lock = threading.Lock()  # taken by `_turn`
        self._salt = self._draw()  # the salt of the next transaction, however often it is begun

    @property
    def is_forked(self) -> bool:
        """Whether this is a child of the process that opened the table."""
        return self._pid != os.getpid()

    @property
    def is_poisoned(self) -> bool:
        """Whether a sync failed."""
        return self._files.poisoned

    def require_usable(self) -> None:
        """Refuse a forked child, and a table whose sync failed.

        Raises
        ------
        ReadOnlyError, TableError
        """
        path = str(self._files.path)
        if self.is_forked:
            what = "the table was opened before a fork; open it in this process, once it is closed"
            raise ReadOnlyError(errno.EROFS, what, path)
        if self.is_poisoned:
            what = "a sync or a rollback failed; close the table, and open it again to recover"
            raise TableError(errno.EIO, what, path)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Give one thread alone the transaction of a usable table."""
        self.require_usable()  # first, as in a forked child the lock may never be free
        with self._lock:
            self.require_usable()  # a sync may have failed during the wait
            yield

    def attach(self, array: F32, pages: _core.Pages) -> None:
        """Take the mapping of the rows, at open and after each change of their number."""

    def protect(self, rows: I64) -> None:
        """Announce that rows are about to change.

        Parameters
        ----------
        rows : int64 array, ascending and unique
            Not used.

        Raises
        ------
        ReadOnlyError, TableError
            No row was changed.
        """
        self.require_usable()
        if self._files.manifest.state == "clean":
            with self._turn():
                if self._files.manifest.state == "clean":
                    self._files.require_held()
                    self.mark_dirty()

    def mark_dirty(self) -> None:
        """Save a dirty manifest."""
        dirty = {"state": "dirty", "salt": self._salt, "boot": self._files.file.system.boot_id()}
        self._files.save(self._files.manifest.with_changes(**dirty))

    def commit(self, state: Manifest) -> None:
        """Sync the rows, and save the manifest that commits them."""
        with self._turn():
            self._files.require_held()
            self.finish(state)

    def finish(self, state: Manifest) -> None:
        """End the transaction: sync the rows, save the manifest, draw a new salt."""
        self._files.finish(state)
        self._salt = self._draw()

    def rollback(self, show: Callable[[], None]) -> None:
        """Refuse: there is no journal."""
        raise ArgumentError(
            f"{self._files.path} keeps no journal; make or open it with durability='process'"
        )

    def write_ahead(self, ids: IdArray, owner: object) -> None:
        """Do nothing: there is no journal."""

    def close(self) -> None:
        """Do nothing: no other file and no thread belongs to it."""


class JournaledTransaction(Transaction):
    """The transaction of a table with a rollback journal.

    It owns the journal, the dirty rows, the change log, and a helper thread for work that no step
    should wait for. Any thread may call it.

    Parameters
    ----------
    files : TableFolder
        Open for writing, and clean; its durability is not "none".
    num_threads : int
        Number of threads that gather and sum old rows.
    """

    keeps_journal = True
    # The crash suite replaces these types by broken ones, which it has to detect.
    dirty_rows_type: type[DirtyRows] = DirtyRows
    change_log_type: type[ChangeLog] = ChangeLog

    def __init__(self, files: TableFolder, num_threads: int) -> None:
        super().__init__(files)
        self._table, state = files, files.manifest
        self._num_threads = num_threads
        self._power = state.durability == "power"
        self._array, self._pages = np.zeros((0, state.stride), np.float32), _core.Pages()
        self._journal = Journal(files.folder, state.stride, state.durability)
        self._dirty_rows = self.dirty_rows_type(state.rows)
        self._change_log = self.change_log_type(files.folder, state.durability)
        self._ahead = deque[IdArray](maxlen=MAX_AHEAD)
        self._helper = files.folder.system.helper("pyembed-journal", 1)
        self._behind = 0  # the journal's bytes_written at the last look of `_write_behind`

    @property
    def is_poisoned(self) -> bool:
        """Whether a sync of the rows, the manifest or the journal failed."""
        return self._files.poisoned or self._journal.failed_sync

    @property
    def frames(self) -> int:
        """Number of frames in the journal of this transaction."""
        return self._journal.frames

    def attach(self, array: F32, pages: _core.Pages) -> None:
        """Take the mapping of the rows, and the cache of their pages."""
        self._array, self._pages = array, pages

    def protect(self, rows: I64) -> None:
        """Keep the old content of rows that are about to change, and mark the table dirty.

        Parameters
        ----------
        rows : int64 array, ascending and unique

        Raises
        ------
        ReadOnlyError, TableError
            If a sync failed before, or the disk is full. No row was changed.
        """
        self.require_usable()
        files = self._files
        if files.manifest.state == "dirty":
            rows = self._dirty_rows.new(rows)
            if not rows.size:
                return  # without waiting for the helper
        with self._turn():
            if files.manifest.state == "clean":
                files.require_held()
                self._dirty_rows.commit(files.manifest.rows)  # if Ctrl-C kept `commit` from it
                self._journal.begin(files.manifest.generation, int(self._salt, 16))
                self.mark_dirty()
            self._record(rows, self._num_threads)

    def _record(self, rows: I64, num_threads: int) -> None:
        """Record and mark rows. If recording fails, they stay unmarked, and the table is intact.

        Raises
        ------
        TableError
            If the disk is full.
        OSError
            If a sync failed: the table is poisoned.
        """
        rows = self._dirty_rows.new(rows)
        if not rows.size:
            return
        threads = for_work(rows.size * self._array.shape[1], num_threads)
        old = _OldRows(self._array, self._pages, rows, threads)
        self._journal.record(rows, old, threads)
        if self._power:
            self._journal.sync()
        else:
            self._write_behind()
        self._dirty_rows.mark(rows)

    def _write_behind(self) -> None:
        """Write frames to the disk if the system is about to choose pages for that by itself.

        The system would choose pages of the table too, and each of these costs a page fault at its
        next change; frames do not change. While there is room, frames stay in memory, because a
        commit makes them obsolete.
        """
        if self._journal.bytes_written - self._behind >= BEHIND_BYTES:
            self._behind = self._journal.bytes_written
            if page_cache.write_back_is_near():
                self._helper.submit(self._journal.start_write_back)

    def write_ahead(self, ids: IdArray, owner: object) -> None:
        """With "power", record rows on the helper, so that the step that needs them does not wait.

        Exceptions are discarded: the step that needs these rows hits the same error. The helper
        keeps a reference to the owner of the table, because a table without references commits and
        closes itself, in any thread, which would wait here for the helper.
        """
        if self._power and not self.is_forked:
            self._ahead.append(ids.flatten())
            with contextlib.suppress(RuntimeError):  # no thread starts when the process ends
                self._helper.submit(self._record_ahead, owner)

    def _record_ahead(self, owner: object) -> None:
        """Record all rows that wait; runs on the helper."""
        some = [self._ahead.popleft() for _ in range(len(self._ahead))]
        ids = np.concatenate([*some, np.zeros(0, np.int64)])
        rows = grouping.group(ids, self._array.shape[0], 1).rows
        with self._turn():
            if self._files.manifest.state == "dirty":
                self._record(rows, 1)  # the caller computes in the meantime

    def commit(self, state: Manifest) -> None:
        """Log which rows changed, sync the rows, and save the manifest that commits them."""
        with self._turn():
            self._files.require_held()
            self._change_log.append(self._files.manifest, state, self._dirty_rows.parts())
            self.finish(state)
            self._dirty_rows.commit(state.rows)

    def rollback(self, show: Callable[[], None]) -> None:
        """Bring the rows back to the last commit.

        If the manifest cannot be saved for a reason that passes, the transaction goes on with the
        rows of the commit, and its journal stays what it was.

        Parameters
        ----------
        show : function
            Called once the rows are back: shows their number and the steps of the commit.

        Raises
        ------
        DirtyError
            If the journal is damaged; nothing is changed then.
        """
        files = self._table
        with self._turn():
            if files.manifest.state == "clean":
                show()
                return
            journal = self._journal
            replay = recovery.judge(files.folder, files.manifest, journal.frames, journal.file)
            with files.poisoned_on_failure():  # a mixture of old and new rows must not be committed
                files.put_back(self._array, replay)
                show()
            try:
                files.save_clean()
            except OSError as error:
                if error.errno not in PASSING:
                    raise
                return
            self._salt = self._draw()
            self._dirty_rows.clear()

    def close(self) -> None:
        """Close the journal. It does not wait for the helper, which may be the thread that closes.

        A late task of the helper finds the journal closed.
        """
        if self.is_forked:  # the parent has the helper, and may hold the lock forever in this copy
            self._journal.close()
            return
        with self._lock:
            self._helper.shutdown(wait=False, cancel_futures=True)
            self._journal.close()
            self._array = self._array[:0].copy()  # the mapping ends with its last view


class _OldRows:
    """Rows as they are, gathered slice by slice into one buffer."""

    def __init__(self, array: F32, pages: _core.Pages, rows: I64, num_threads: int) -> None:
        self._whole, self._rows, self._threads = _core.Column(array, pages), rows, num_threads
        self._buffer = np.empty((0, array.shape[1]), np.float32)
        _core.readahead(self._whole, rows)

    def __getitem__(self, part: slice) -> F32:
        rows = self._rows[part]
        if rows.size > self._buffer.shape[0]:
            self._buffer = np.empty((rows.size, self._buffer.shape[1]), np.float32)
        return _core.gather(self._whole, rows, self._buffer[: rows.size], self._threads)
