"""The files of a table as a whole: create, lock, map, change, commit, roll back, recover, grow.

A table is a folder::

    rows.npy        float32, C order, shape (rows, stride), header padded to 4096 bytes
    manifest.json   the committed state, see manifest.py
    undo0, undo1    the journal while rows change, see journal.py
    changes         which rows changed from commit to commit, see changes.py
    lock            held by flock: exclusively by a writer, shared by readers
    seal.npy        checksums, if no commit changed rows since they were written, see seal.py
    id_map.npy      optional: the row of each id, see order.py; never changes

State diagram (the function on each arrow)::

    absent ──create──► clean ──protect──► dirty ──commit──► clean, one generation on
                         ▲                  │
                         ├──── rollback ────┤
                         └── open, after ───┘ the writer died

A change, in this order; each line returns before the next begins::

    protect   the first after a commit: the journal begins (frame 0), then the manifest says dirty
              rows not yet marked since the commit: their old content is recorded in the journal
              with durability "power": the journal is synced
              they are marked (with "power" the helper may have done so before, since `write_ahead`)
    kernel    rows change

    commit    which rows changed is logged (with "power" synced); rows are synced; then the manifest
              says clean, with the next generation: from here on no frame of the journal is of any
              interval, as the next one has another salt
    undo      (rollback, recovery) the journal is read whole and judged; its rows are put back;
              rows are synced; then the manifest says clean

What a table promises is its durability. "process": whenever the writing process dies, the next one
to open it finds the last commit, bit for bit. "power": the same when the machine dies. "none":
there is no journal; it is known that changes were not committed, and the table is refused.

1. Sizes are compared with the manifest before anything is mapped, and space is allocated before
   it is mapped, so no access to a mapping raises SIGBUS for a file that is too short or a disk
   that is full.
2. No row changes before its old content is as safe as the table's durability promises.
3. Rows are synced before the manifest that commits them.
4. A table appears under its name complete or not at all.
5. A dirty manifest keeps what was committed: rows appended since lie behind it, and are cut off by
   an undo.
6. From the look at the marks until they are set nobody else records, and no interval begins or
   ends (`_mutex`); one begins without marks. So what is marked is in the journal of this interval.
   It is there as the commit left it, as a row without a mark has not changed: who changes rows has
   `protect` return first, and no interval ends between that and the change (`Rows._turns`).
7. After a sync or an undo that failed nothing is called committed any more: what is lost, or
   half done, is unknown. To open the table again recovers it.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import mmap
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyembed._checks import F32, IdArray
from pyembed.errors import ArgumentError, FormatError, LockedError, ReadOnlyError, TableError
from pyembed.storage import checksums, id_map, recovery
from pyembed.storage import manifest as manifests
from pyembed.storage.fs import FULL, File, Folder, open_file
from pyembed.storage.journal import FILES, Replay
from pyembed.storage.manifest import Manifest
from pyembed.storage.npy import HEAD_BYTES, HEADER_BYTES, read_rows, rows_header
from pyembed.storage.page_cache import PageCache
from pyembed.storage.transaction import Interval

I64 = NDArray[np.int64]
CLEAN = {"state": "clean", "salt": "", "boot": ""}


class Store:
    """An open table: its mapping, its lock, its manifest, its journal.

    Parameters
    ----------
    path : Path
    mode : {"r", "r+", "c"}
        Read; read and write; write to a private copy that never reaches the file.
    live, salvage : bool
        See `Table.open`.
    memory_limit : int, optional
        Bytes.
    durability : {"process", "power", "none"}, optional
        From the next change on, instead of the table's own.
    threads : int
        That write the journal.

    Attributes
    ----------
    manifest : Manifest
    optimizer : dict of str to dict
        The manifest's, to be changed in place; the next commit stores it.
    array : float32 array of shape (rows, stride)
        The mapping.
    keeper : PageCache
        Looks after the mapping's pages.
    id_map : int64 array of shape (rows,) or None
        The mapping of ``id_map.npy``, read-only.
    """

    def __init__(
        self,
        path: Path,
        mode: str,
        live: bool = False,
        salvage: bool = False,
        memory_limit: int | None = None,
        durability: str | None = None,
        threads: int = 1,
    ) -> None:
        self.path, self.mode = path.absolute(), mode
        self.keeper: PageCache | None = None
        self.folder = path.is_dir()
        self._folder: Folder | None = None
        self._lock: File | None = None
        self._file: File = None  # type: ignore[assignment]
        self._pid = os.getpid()
        self._failed_sync = self._writes = False
        self._interval: Interval | None = None
        self._threads = threads
        self._mutex = threading.Lock()  # of whoever records, or ends an interval
        flags = os.O_RDWR if mode == "r+" else os.O_RDONLY
        try:
            if self.folder:
                self._folder = Folder(path)
                self._lock = self._folder.open("lock", flags)
            else:
                self._lock = open_file(path, flags)
            if not live:
                self._take_lock(self._lock)
            if self._folder is not None:
                self._file = self._folder.open("rows.npy", flags)
            else:
                self._file = self._lock
            self._draw = self._file.system.token
            self._salt = self._draw()  # of the next interval, however often it is begun
            self._open_rows(live, salvage)
            self.optimizer = copy.deepcopy(self.manifest.optimizer)
            self.id_map = None
            if self._folder is not None:
                self.id_map = id_map.load(self._folder, self.manifest.rows)
            self.keeper = PageCache(self._file, self.array, memory_limit, mode == "r+")
            self._pages = self.keeper.pages
            self._open_interval(durability)
            self._writes = self.folder and mode == "r+"
        except BaseException:
            self.release()
            raise

    # --- opening ------------------------------------------------------------------------------

    def _take_lock(self, lock: File) -> None:
        try:
            lock.system.lock(lock.fd, self.mode == "r+")
        except BlockingIOError:
            if self.mode == "r+":
                what = "another process or handle has it open; close it first"
            else:
                what = "a writer has it open; close it first, or read beside it with live=True"
            raise LockedError(errno.EWOULDBLOCK, what, str(self.path)) from None

    def _open_rows(self, live: bool, salvage: bool) -> None:
        """Map the rows of the last commit, recovered if need be; or as they are."""
        if self._folder is None:
            rows, stride, self._offset = self._read_header()
            self.manifest = Manifest(rows, {"weight": stride})
            self.array = self._map(rows)
            return
        text = self._folder.read("manifest.json")
        self.manifest = manifests.decode(text, str(self.path / "manifest.json"))
        if self.manifest.state == "dirty" and not salvage:
            # An undo that the machine did not survive may have cut off rows that the header on
            # the disk still counts. The next undo writes it anew.
            rows, stride, self._offset = self.manifest.rows, self.manifest.stride, HEADER_BYTES
        else:
            rows, stride, self._offset = self._read_header()
        self._check_sizes(rows, stride)
        if self.manifest.state == "clean" or live:
            self.array = self._map(self.manifest.rows)
        elif salvage:
            self.array = self._map(rows)
            self._adopt(rows)
        else:
            replay = recovery.judge(self._folder, self.manifest)
            self.array = self._map(self.manifest.rows, private=self.mode != "r+")
            self._put_back(replay)

    def _read_header(self) -> tuple[int, int, int]:
        file = self._file
        return read_rows(file.read_at(HEAD_BYTES, 0), file.size, file.path)

    def _check_sizes(self, rows: int, stride: int) -> None:
        state, size = self.manifest, self._file.size
        expected = HEADER_BYTES + 4 * state.rows * state.stride
        if state.state == "clean":
            sound = rows == state.rows and size == expected
        else:  # rows may have been appended, or be just about to
            sound = rows >= state.rows and size >= HEADER_BYTES + 4 * rows * stride
        if not sound or (stride, self._offset) != (state.stride, HEADER_BYTES):
            raise FormatError(
                f"{self._file.path}: {size} bytes with a header of {self._offset} for "
                f"({rows}, {stride}); its manifest asks for {expected} with {HEADER_BYTES} for "
                f"({state.rows}, {state.stride}): "
                "it was cut short, or is of another table; restore it from a copy"
            )

    def _map(self, rows: int, private: bool = False) -> F32:
        access = {"r": mmap.ACCESS_READ, "r+": mmap.ACCESS_WRITE, "c": mmap.ACCESS_COPY}[self.mode]
        access = mmap.ACCESS_COPY if private else access
        return self._file.map_rows(self._offset, rows, self.manifest.stride, access)

    def _open_interval(self, durability: str | None) -> None:
        if self.mode != "r+" or self._folder is None:
            return
        if durability is not None and durability != self.manifest.durability:
            self._set(self.manifest.with_changes(durability=durability))
        if self.manifest.durability != "none":
            self._interval = Interval(self._folder, self.manifest)

    # --- undo ---------------------------------------------------------------------------------

    def _put_back(self, replay: Replay) -> None:
        """Rows as the journal has them; in the file, only then clean; or in a private mapping."""
        recovery.put_back(self.array, replay, self._file if self.mode == "r+" else None)
        if self.mode != "r+":
            self.array.flags.writeable = self.mode == "c"
            return
        state = self.manifest
        self._file.write_at([rows_header(state.rows, state.stride)], 0)
        self._file.truncate(HEADER_BYTES + 4 * state.rows * state.stride)
        self._finish_interval(state.with_changes(**CLEAN))

    def _adopt(self, rows: int) -> None:
        """Rows that no commit vouches for are committed as they are, if they may be changed."""
        if self.mode == "r+":
            self._file.truncate(HEADER_BYTES + 4 * rows * self.manifest.stride)
            new = self.manifest.with_changes(rows=rows, seal="", **CLEAN)
            number, commit = new.generation + 1, self._draw()
            self._finish_interval(new.with_changes(generation=number, commit=commit))

    def _finish_interval(self, state: Manifest) -> None:
        """Sync the rows, then say in the manifest what they are."""
        self._sync_rows()
        self._set(state)
        self._salt = self._draw()

    def _sync_rows(self) -> None:
        """The first failure is final, and so is an interruption: a second try proves nothing."""
        try:
            self._file.sync()
        except BaseException:
            self._failed_sync = True
            raise

    def rollback(self) -> None:
        """Bring rows and meta back to the last commit.

        Raises
        ------
        ArgumentError
            If the table keeps no journal.
        DirtyError
            If the journal is damaged; nothing is changed then.
        """
        self._require_writer()
        if self._interval is None or self._folder is None:
            raise ArgumentError(
                f"{self.path} keeps no journal; make or open it with durability='process'"
            )
        if self.manifest.state == "clean":
            self._forget_steps()
            return
        with self._turn():
            replay = recovery.judge(self._folder, self.manifest, self._interval.journal.frames)
            rows = self.manifest.rows
            try:
                self._put_back(replay)
            except BaseException:  # rows of two times must not be committed
                self._failed_sync = True
                raise
            self._forget_steps()
            self._interval.dirty_rows.clear()
            if rows != self.array.shape[0]:
                self._remap(rows)

    def _forget_steps(self) -> None:
        """Optimizers have come as far as the last commit says."""
        self.optimizer.clear()
        self.optimizer |= copy.deepcopy(self.manifest.optimizer)

    # --- changing -----------------------------------------------------------------------------

    def _require_writer(self) -> None:
        """Refuse a reader, a copy in a forked child, and a table whose sync failed."""
        if self.mode == "r":
            raise ReadOnlyError(
                errno.EROFS, 'the table is open for reading; open it with mode="r+"', str(self.path)
            )
        if self._pid != os.getpid():
            what = "the table was opened before a fork; open it in this process, once it is closed"
            raise ReadOnlyError(errno.EROFS, what, str(self.path))
        if self._failed:
            what = "a sync or an undo failed; close it, and open it again to recover"
            raise TableError(errno.EIO, what, str(self.path))

    @property
    def _failed(self) -> bool:
        interval = self._interval
        return self._failed_sync or (interval is not None and interval.journal.failed_sync)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Nobody else records, and no interval ends; what failed before that is known."""
        self._require_writer()  # first, as in a forked child the mutex may never be free
        with self._mutex:
            self._require_writer()
            yield

    @property
    def keeps_journal(self) -> bool:
        return self._interval is not None

    def protect(self, rows: I64) -> None:
        """Before rows change: keep what they were at the last commit, and say that they change.

        Parameters
        ----------
        rows : int64 array, ascending and unique
            Those that may change next; not looked at without a journal.

        Raises
        ------
        ReadOnlyError
            If the table was opened for reading, or in the parent of this process.
        TableError
            If a sync failed before, or the disk has no room for the journal. No row was changed.
        """
        self._require_writer()
        interval = self._interval
        if interval is not None and self.manifest.state == "dirty":
            rows = interval.dirty_rows.new(rows)
            if not rows.size:
                return  # whatever the helper is at
        with self._turn():
            if self.mode != "r+":
                return
            if self.manifest.state == "clean":
                if interval is not None:
                    interval.dirty_rows.commit(self.manifest.rows)  # if Ctrl-C kept the end from it
                    interval.journal.begin(self.manifest.generation, int(self._salt, 16))
                dirty = {"state": "dirty", "salt": self._salt, "boot": self._file.system.boot_id()}
                self._set(self.manifest.with_changes(**dirty))
            if interval is not None:
                interval.record(self.array, self._pages, rows, self._threads)

    def write_ahead(self, ids: IdArray, owner: object) -> None:
        """With "power", have the helper record these rows, so that no step has to wait for it."""
        interval = self._interval
        if interval is not None and interval.power and self._pid == os.getpid():
            interval.ask(ids, self._record_asked, owner)

    def _record_asked(self, interval: Interval) -> None:
        rows = interval.asked(self.array.shape[0])
        with self._turn():
            if self.manifest.state == "dirty":
                interval.record(self.array, self._pages, rows, 1)  # the caller computes meanwhile

    def commit(self, meta: dict[str, Any] | None) -> None:
        """Sync the rows, then say so in the manifest."""
        state = self.manifest
        same = state.state == "clean" and state.optimizer == self.optimizer and meta is None
        if same and self.mode == "r+":
            self._require_writer()
            return
        meta = state.meta if meta is None else meta
        number, commit = state.generation + 1, self._draw()
        self.commit_as(generation=number, commit=commit, meta=meta, optimizer=self.optimizer)

    def commit_as(self, **what: Any) -> None:
        """A commit of which the caller says what it is, in fields of the manifest."""
        self._require_writer()
        if self.mode == "c":
            refusal = "a private copy has no commit; open the table with mode='r+'"
            raise ReadOnlyError(errno.EROFS, refusal, str(self.path))
        before = self.manifest
        seal = before.seal if before.state == "clean" else ""
        state = before.with_changes(**what, rows=self.array.shape[0], seal=seal, **CLEAN)
        # A meta that cannot be stored is refused before anything is synced; and a copy is kept.
        state = manifests.decode(manifests.encode(state), str(self.path))
        with self._turn():
            if self._interval is not None:
                self._interval.log(before, state)
            self._finish_interval(state)
            if self._interval is not None:
                self._interval.dirty_rows.commit(state.rows)

    def append(self, chunks: Iterable[F32], count: int) -> None:
        """Add `count` rows: allocate, write, sync, then the header; the next commit counts them."""
        before, stride = self.array.shape[0], self.manifest.stride
        if self.mode != "r+" or not self.folder:
            raise ReadOnlyError(
                errno.EROFS, 'append needs a table folder open "r+"', str(self.path)
            )
        end = HEADER_BYTES + 4 * before * stride
        self.protect(np.zeros(0, np.int64))
        try:
            self._file.allocate(end, 4 * count * stride)
            at = end
            for chunk in chunks:
                at = self._file.write_at([chunk], at)
            self._sync_rows()  # of changes that were made before, too
            self._file.write_at([rows_header(before + count, stride)], 0)
        except BaseException:
            self._file.write_at([rows_header(before, stride)], 0)
            self._file.truncate(end)
            raise
        self._remap(before + count)

    def _remap(self, rows: int) -> None:
        self.array = self._map(rows)
        if self.keeper is not None:
            self.keeper.rows = self.array

    def _set(self, state: Manifest) -> None:
        if self._folder is not None:
            try:
                self._folder.replace("manifest.json", [manifests.encode(state)])
            except BaseException as error:
                # The file may say so already, or not: rows must not change any more. But a full
                # disk is met before the new manifest has its name.
                full = isinstance(error, OSError) and error.errno in FULL
                self._failed_sync = self._failed_sync or not full
                raise
        self.manifest = state

    # --- the end ------------------------------------------------------------------------------

    def release(self) -> None:
        """Let go of the lock and the files; the mapping lives as long as an array shows it."""
        if self._interval is not None and self._pid != os.getpid():
            self._interval.journal.close()  # the rest is the parent's, and locked perhaps
        elif self._interval is not None:
            with self._mutex:
                self._interval.close()
        self.array = np.zeros((0, 1), np.float32)
        if self.keeper is not None:
            self.keeper.close()
            self.keeper.rows = self.array
        if self._writes and self.manifest.state == "clean" and not self._failed:
            self._remove_useless()
        for opened in (self._file, self._lock, self._folder):
            if opened is not None:
                opened.close()

    def _remove_useless(self) -> None:
        """Nobody needs what these hold, so they may stay as well."""
        useless = [*FILES] if self.manifest.seal else [*FILES, checksums.FILE]
        for name in useless if self._pid == os.getpid() else ():
            with contextlib.suppress(OSError):
                self._folder.unlink(name)  # type: ignore[union-attr]

    def abandon(self) -> None:
        """The table was dropped, or is open at exit: no work is lost for a forgotten close."""
        forgotten = self.mode == "r+" and self.manifest.state == "dirty"
        try:
            if forgotten and self._pid == os.getpid() and not self._failed:
                self.commit(None)
        finally:
            self.release()
        if forgotten and self._pid == os.getpid():
            message = f"{self.path} was not closed; its changes are committed now"
            warnings.warn(message, ResourceWarning, stacklevel=2)
