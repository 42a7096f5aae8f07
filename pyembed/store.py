"""The files of a table as a whole: create, lock, map, change, commit, roll back, recover, grow.

A table is a folder::

    rows.npy        float32, C order, shape (rows, stride), header padded to 4096 bytes
    manifest.json   the committed state, see manifest.py
    undo0, undo1    the journal while rows change, see journal.py
    lock            held by flock: exclusively by a writer, shared by readers
    id_map.npy      optional: the row of each id, see order.py; never changes

State diagram (the function on each arrow)::

    absent ──create──► clean ──protect──► dirty ──commit──► clean, one generation on
                         ▲                  │
                         ├──── rollback ────┤
                         └── open, after ───┘ the writer died

A change, in this order; each line returns before the next begins::

    protect   the first after a commit: the journal begins (frame 0), then the manifest says dirty
              rows not yet touched since the commit: their old content is recorded in the journal
              with durability "power": the journal is synced
              they are marked as touched
    kernel    rows change

    commit    rows are synced; then the manifest says clean, with the next generation: from here
              on no frame of the journal is of any interval, as the next one has another salt
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
6. After a sync or an undo that failed nothing is called committed any more: what is lost, or
   half done, is unknown. To open the table again recovers it.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import mmap
import os
import secrets
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyembed import manifest as manifests
from pyembed import order, undo
from pyembed.arrays import F32
from pyembed.errors import (
    ArgumentError,
    DirtyError,
    FormatError,
    LockedError,
    ReadOnlyError,
    TableError,
)
from pyembed.files import (
    HEADER_BYTES,
    allocate,
    npy_header,
    read_npy_header,
    replace_file,
    sync,
    write_all,
)
from pyembed.journal import Replay
from pyembed.manifest import Manifest
from pyembed.recording import Recorder
from pyembed.residency import Keeper

I64 = NDArray[np.int64]
CLEAN = {"state": "clean", "salt": "", "boot": ""}
FULL = (errno.ENOSPC, errno.EDQUOT)


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
    keeper : residency.Keeper
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
        self.path, self.mode = path, mode
        self.keeper: Keeper | None = None
        self.folder = path.is_dir()
        self._lock_fd = self._fd = -1
        self._pid = os.getpid()
        self._failed_sync = False
        self._recorder: Recorder | None = None
        self._salt = secrets.token_hex(8)  # of the next interval, however often it is begun
        self._mutex = threading.Lock()  # several threads may make the first change at once
        flags = (os.O_RDWR if mode == "r+" else os.O_RDONLY) | os.O_CLOEXEC
        try:
            self._file = path / "rows.npy" if self.folder else path
            self._lock_fd = os.open(path / "lock" if self.folder else path, flags)
            if not live:
                self._take_lock()
            self._fd = os.open(self._file, flags)
            self._open_rows(live, salvage)
            self.optimizer = copy.deepcopy(self.manifest.optimizer)
            self.id_map = self._map_ids()
            self.keeper = Keeper(self._fd, self.array, memory_limit, mode == "r+")
            self._pages = self.keeper.pages
            self._open_journal(durability, threads)
        except BaseException:
            self.release()
            raise

    # --- opening ------------------------------------------------------------------------------

    def _take_lock(self) -> None:
        kind = fcntl.LOCK_EX if self.mode == "r+" else fcntl.LOCK_SH
        try:
            fcntl.flock(self._lock_fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if self.mode == "r+":
                what = "another process or handle has it open; close it first"
            else:
                what = "a writer has it open; close it first, or read beside it with live=True"
            raise LockedError(errno.EWOULDBLOCK, what, str(self.path)) from None

    def _open_rows(self, live: bool, salvage: bool) -> None:
        """Map the rows of the last commit, recovered if need be; or as they are."""
        if not self.folder:
            rows, stride, self._offset = read_npy_header(self._file, self._fd)
            self.manifest = Manifest(rows, {"weight": stride})
            self.array = self._map(rows)
            return
        source = self.path / "manifest.json"
        self.manifest = manifests.decode(source.read_bytes(), str(source))
        if self.manifest.state == "dirty" and not salvage:
            # An undo that the machine did not survive may have cut off rows that the header on
            # the disk still counts. The next undo writes it anew.
            rows, stride, self._offset = self.manifest.rows, self.manifest.stride, HEADER_BYTES
        else:
            rows, stride, self._offset = read_npy_header(self._file, self._fd)
        self._check_sizes(rows, stride)
        if self.manifest.state == "clean" or live:
            self.array = self._map(self.manifest.rows)
        elif salvage:
            self.array = self._map(rows)
            self._adopt(rows)
        else:
            replay = undo.judge(self.path, self.manifest)
            self.array = self._map(self.manifest.rows, private=self.mode != "r+")
            self._put_back(replay)

    def _check_sizes(self, rows: int, stride: int) -> None:
        state, size = self.manifest, os.fstat(self._fd).st_size
        expected = HEADER_BYTES + 4 * state.rows * state.stride
        if state.state == "clean":
            sound = rows == state.rows and size == expected
        else:  # rows may have been appended, or be just about to
            sound = rows >= state.rows and size >= HEADER_BYTES + 4 * rows * stride
        if not sound or (stride, self._offset) != (state.stride, HEADER_BYTES):
            raise FormatError(
                f"{self._file}: {size} bytes with a header of {self._offset} for "
                f"({rows}, {stride}); its manifest asks for {expected} with {HEADER_BYTES} for "
                f"({state.rows}, {state.stride}): "
                "it was cut short, or is of another table; restore it from a copy"
            )

    def _map(self, rows: int, private: bool = False) -> F32:
        stride = self.manifest.stride
        access = {"r": mmap.ACCESS_READ, "r+": mmap.ACCESS_WRITE, "c": mmap.ACCESS_COPY}[self.mode]
        if rows == 0:
            return np.zeros((0, stride), np.float32)
        access = mmap.ACCESS_COPY if private else access
        memory = mmap.mmap(self._fd, self._offset + 4 * rows * stride, access=access)
        with contextlib.suppress(OSError, AttributeError):  # a hint; not every system has it
            # The system's read-ahead would read megabytes for one cold row.
            memory.madvise(mmap.MADV_RANDOM)
        flat = np.frombuffer(memory, np.float32, rows * stride, self._offset)
        return flat.reshape(rows, stride)

    def _map_ids(self) -> NDArray[np.int64] | None:
        file, rows = self.path / order.FILE, self.manifest.rows
        if not self.folder or not file.exists():
            return None
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            offset = order.data_offset(file, fd, rows)
            memory = mmap.mmap(fd, offset + 8 * rows, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)
        return np.frombuffer(memory, np.int64, rows, offset)

    def _open_journal(self, durability: str | None, threads: int) -> None:
        if self.mode != "r+" or not self.folder:
            return
        if durability is not None and durability != self.manifest.durability:
            self._set(self.manifest.with_changes(durability=durability))
        if self.manifest.durability != "none":
            self._recorder = Recorder(self.path, self.manifest, threads)

    # --- undo ---------------------------------------------------------------------------------

    def _put_back(self, replay: Replay) -> None:
        """Rows as the journal has them; in the file, only then clean; or in a private mapping."""
        undo.put_back(self.array, replay, self._fd if self.mode == "r+" else -1)
        if self.mode != "r+":
            self.array.flags.writeable = self.mode == "c"
            return
        state = self.manifest
        os.pwrite(self._fd, npy_header(state.rows, state.stride), 0)
        os.ftruncate(self._fd, HEADER_BYTES + 4 * state.rows * state.stride)
        self._finish_interval(state.with_changes(**CLEAN))

    def _adopt(self, rows: int) -> None:
        """Rows that no commit vouches for are committed as they are, if they may be changed."""
        if self.mode == "r+":
            os.ftruncate(self._fd, HEADER_BYTES + 4 * rows * self.manifest.stride)
            number = self.manifest.generation + 1
            self._finish_interval(self.manifest.with_changes(rows=rows, generation=number, **CLEAN))

    def _finish_interval(self, state: Manifest) -> None:
        """Sync the rows, then say in the manifest what they are."""
        self._sync_rows()
        self._set(state)
        self._salt = secrets.token_hex(8)

    def _sync_rows(self) -> None:
        """The first failure is final, and so is an interruption: a second try proves nothing."""
        try:
            sync(self._fd)
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
        if self._recorder is None:
            raise ArgumentError(
                f"{self.path} keeps no journal; make or open it with durability='process'"
            )
        if self.manifest.state == "clean":
            self._forget_steps()
            return
        replay = undo.judge(self.path, self.manifest)
        if replay.frames < self._recorder.frames:
            what = f"{replay.frames} of {self._recorder.frames} frames of the journal are left"
            raise DirtyError(errno.EUCLEAN, f"{what}; close the table", str(self.path))
        rows = self.manifest.rows
        try:
            self._put_back(replay)
        except BaseException:  # rows of two times must not be committed
            self._failed_sync = True
            raise
        self._forget_steps()
        self._recorder.rolled_back()
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
        if self._failed_sync:
            what = "a sync or an undo failed; close it, and open it again to recover"
            raise TableError(errno.EIO, what, str(self.path))

    @property
    def keeps_journal(self) -> bool:
        return self._recorder is not None

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
        with self._mutex:
            if self.mode != "r+":
                return
            if self.manifest.state == "clean":
                if self._recorder is not None:
                    self._recorder.begin(self.manifest.generation, int(self._salt, 16))
                dirty = {"state": "dirty", "salt": self._salt, "boot": undo.boot_id()}
                self._set(self.manifest.with_changes(**dirty))
            if self._recorder is not None:
                try:
                    self._recorder.protect(self.array, self._pages, rows)
                finally:
                    self._failed_sync = self._failed_sync or self._recorder.failed_sync

    def commit(self, meta: dict[str, Any] | None) -> None:
        """Sync the rows, then say so in the manifest."""
        self._require_writer()
        if self.mode == "c":
            what = "a private copy has no commit; open the table with mode='r+'"
            raise ReadOnlyError(errno.EROFS, what, str(self.path))
        unchanged = self.manifest.state == "clean" and self.manifest.optimizer == self.optimizer
        if unchanged and meta is None:
            return
        state = self.manifest.with_changes(
            rows=self.array.shape[0],
            generation=self.manifest.generation + 1,
            meta=self.manifest.meta if meta is None else meta,
            optimizer=self.optimizer,
            **CLEAN,
        )
        # A meta that cannot be stored is refused before anything is synced; and a copy is kept.
        state = manifests.decode(manifests.encode(state), str(self.path))
        self._finish_interval(state)
        if self._recorder is not None:
            self._recorder.committed(state.rows)

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
            allocate(self._fd, end, 4 * count * stride, self._file)
            os.lseek(self._fd, end, os.SEEK_SET)
            for chunk in chunks:
                write_all(self._fd, chunk)
            self._sync_rows()  # of changes that were made before, too
            os.pwrite(self._fd, npy_header(before + count, stride), 0)
        except BaseException:
            os.pwrite(self._fd, npy_header(before, stride), 0)
            os.ftruncate(self._fd, end)
            raise
        self._remap(before + count)

    def _remap(self, rows: int) -> None:
        self.array = self._map(rows)
        if self.keeper is not None:
            self.keeper.rows = self.array

    def _set(self, state: Manifest) -> None:
        if self.folder:
            try:
                replace_file(self.path / "manifest.json", manifests.encode(state))
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
        self.array = np.zeros((0, 1), np.float32)
        if self.keeper is not None:
            self.keeper.close()
            self.keeper.rows = self.array
        if self._recorder is not None:
            sound = self.manifest.state == "clean" and not self._failed_sync
            self._recorder.close(needed=not sound or self._pid != os.getpid())
        for fd in (self._fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock_fd = -1

    def abandon(self) -> None:
        """The table was dropped, or is open at exit: no work is lost for a forgotten close."""
        forgotten = self.mode == "r+" and self.manifest.state == "dirty"
        try:
            if forgotten and self._pid == os.getpid() and not self._failed_sync:
                self.commit(None)
        finally:
            self.release()
        if forgotten and self._pid == os.getpid():
            message = f"{self.path} was not closed; its changes are committed now"
            warnings.warn(message, ResourceWarning, stacklevel=2)
