"""The files of a table as a whole: create, lock, map, commit, grow.

A table is a folder::

    rows.npy        float32, C order, shape (rows, stride), header padded to 4096 bytes
    manifest.json   the committed state, see manifest.py
    lock            held by flock: exclusively by a writer, shared by readers
    id_map.npy      optional: the row of each id, see order.py; never changes

State diagram (the function on each arrow)::

    absent ──create──► clean ──mark_dirty──► dirty ──commit──► clean
                         ▲                     │
                         └──commit──salvage────┘ (the writer died: open refuses without salvage)

What it promises today is durability "none": a table whose writer died between mark_dirty and
commit is known to be dirty, and is not opened as if nothing had happened. Rows may then be from
any time since the last commit.

1. Sizes are compared with the manifest before anything is mapped, and space is allocated before
   it is mapped, so no access to a mapping raises SIGBUS for a file that is too short or a disk
   that is full.
2. Rows are synced before the manifest that commits them.
3. A table appears under its name complete or not at all.
4. A file is longer than its manifest only while the manifest says dirty: an append in progress, or
   one that died, which salvage cuts off.
5. After a sync that failed nothing is called committed any more: what it lost is unknown.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import mmap
import os
import secrets
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyembed import manifest as manifests
from pyembed import order
from pyembed.arrays import F32
from pyembed.errors import DirtyError, FormatError, LockedError, ReadOnlyError, TableError
from pyembed.files import (
    HEADER_BYTES,
    DirectWriter,
    allocate,
    npy_header,
    read_npy_header,
    replace_file,
    sync,
    sync_folder,
    write_all,
)
from pyembed.manifest import Manifest
from pyembed.residency import Keeper


def create(
    path: Path,
    columns: dict[str, int],
    chunks: Iterable[F32],
    rows: int | None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write a whole new table from chunks of rows, in the memory of one chunk.

    Parameters
    ----------
    path : Path
        Must not exist. It appears complete or not at all; on any exception nothing is left.
    columns : dict
        Names and widths; their sum is the width of a chunk.
    chunks : iterable of float32 arrays of shape (any, stride)
    rows : int or None
        How many there will be, if that is known: the space is then allocated first.
    finish : function of the folder, optional
        Writes what else belongs to the table (a vocabulary), before the table appears.

    Raises
    ------
    FileExistsError
    TableError
        If the disk is full.
    """
    if os.path.lexists(path):
        raise FileExistsError(
            errno.EEXIST, "there is something already; choose a new name", str(path)
        )
    stride = sum(columns.values())
    temporary = path.with_name(f"{path.name}.creating-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        written = _write_rows(temporary / "rows.npy", stride, chunks, rows)
        (temporary / "lock").touch()
        if finish is not None:
            finish(temporary)
        replace_file(temporary / "manifest.json", manifests.encode(Manifest(written, columns)))
        temporary.rename(path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_rows(path: Path, stride: int, chunks: Iterable[F32], rows: int | None) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        if rows is not None:
            allocate(fd, 0, HEADER_BYTES + 4 * rows * stride, path)
        written = 0
        with DirectWriter(fd, path) as writer:
            writer.write(npy_header(rows or 0, stride))
            for chunk in chunks:
                writer.write(np.ascontiguousarray(chunk, np.float32))
                written += chunk.shape[0]
        if rows is None:
            os.pwrite(fd, npy_header(written, stride), 0)
        elif written != rows:
            raise ValueError(f"{written} rows were made instead of {rows}")
        sync(fd)
        return written
    except OSError as error:
        if error.errno == errno.ENOSPC and not isinstance(error, TableError):
            raise TableError(error.errno, f"{error.strerror}: make room", str(path)) from None
        raise
    finally:
        os.close(fd)


class Store:
    """An open table: its mapping, its lock, its manifest.

    Attributes
    ----------
    path : Path
    mode : {"r", "r+", "c"}
        Read; read and write; write to a private copy that never reaches the file.
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
    ) -> None:
        self.path, self.mode = path, mode
        self.keeper: Keeper | None = None
        self.folder = path.is_dir()
        self._lock_fd = self._fd = -1
        self._pid = os.getpid()
        self._failed_sync = False
        self._mutex = threading.Lock()  # several threads may make the first change at once
        flags = (os.O_RDWR if mode == "r+" else os.O_RDONLY) | os.O_CLOEXEC
        try:
            file = path / "rows.npy" if self.folder else path
            self._lock_fd = os.open(path / "lock" if self.folder else path, flags)
            if not live:
                self._take_lock()
            self._fd = os.open(file, flags)
            self.manifest, self._offset = self._read_state(file, live, salvage)
            self.optimizer = copy.deepcopy(self.manifest.optimizer)
            self.array = self._map()
            self.id_map = self._map_ids()
            self.keeper = Keeper(self._fd, self.array, memory_limit, mode == "r+")
        except BaseException:
            self.release()
            raise

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

    def _read_state(self, file: Path, live: bool, salvage: bool) -> tuple[Manifest, int]:
        rows, stride, offset = read_npy_header(file, self._fd)
        if not self.folder:
            return Manifest(rows, {"weight": stride}), offset
        source = self.path / "manifest.json"
        state = manifests.decode(source.read_bytes(), str(source))
        if state.state == "dirty" and not (live or salvage):
            raise DirtyError(
                errno.EUCLEAN,
                f"the last writer ended without a commit after generation {state.generation}: rows "
                "may be from any time since; restore a copy, or open it as it is with salvage=True",
                str(self.path),
            )
        size = os.fstat(self._fd).st_size
        expected = HEADER_BYTES + 4 * state.rows * state.stride
        growing = state.state == "dirty" and rows >= state.rows and size > expected
        sound = (rows == state.rows and size == expected) or growing
        if not sound or (stride, offset) != (state.stride, HEADER_BYTES):
            raise FormatError(
                f"{file}: {size} bytes with a header of {offset} for ({rows}, {stride}); its "
                f"manifest asks for {expected} with {HEADER_BYTES} for "
                f"({state.rows}, {state.stride}): "
                "it was cut short, or is of another table; restore it from a copy"
            )
        if growing and self.mode == "r+":
            os.pwrite(self._fd, npy_header(state.rows, stride), 0)
            os.ftruncate(self._fd, expected)
        return state, offset

    def _map(self) -> F32:
        rows, stride = self.manifest.rows, self.manifest.stride
        access = {"r": mmap.ACCESS_READ, "r+": mmap.ACCESS_WRITE, "c": mmap.ACCESS_COPY}[self.mode]
        if rows == 0:
            return np.zeros((0, stride), np.float32)
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
            what = "a sync failed, so rows may be lost; close it, and go on from a copy"
            raise TableError(errno.EIO, what, str(self.path))

    def mark_dirty(self) -> None:
        """Before the first change after a commit: say in the manifest that rows are changing.

        Raises
        ------
        ReadOnlyError
            If the table was opened for reading, or in the parent of this process.
        TableError
            If a sync failed before.
        """
        self._require_writer()
        with self._mutex:
            if self.manifest.state == "clean" and self.mode == "r+":
                self._set(self.manifest.with_changes(state="dirty"))

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
            state="clean",
            generation=self.manifest.generation + 1,
            meta=self.manifest.meta if meta is None else meta,
            optimizer=self.optimizer,
        )
        # A meta that cannot be stored is refused before anything is synced; and a copy is kept.
        state = manifests.decode(manifests.encode(state), str(self.path))
        self._sync()
        self._set(state)

    def _sync(self) -> None:
        try:
            sync(self._fd)
        except OSError:
            self._failed_sync = True
            raise

    def append(self, chunks: Iterable[F32], count: int) -> None:
        """Add `count` rows at the end: allocate, write, sync; then header and manifest."""
        before, stride = self.manifest, self.manifest.stride
        if self.mode != "r+" or not self.folder:
            raise ReadOnlyError(
                errno.EROFS, 'append needs a table folder open "r+"', str(self.path)
            )
        end, rows = HEADER_BYTES + 4 * before.rows * stride, before.rows + count
        self.mark_dirty()
        try:
            allocate(self._fd, end, 4 * count * stride, self.path / "rows.npy")
            os.lseek(self._fd, end, os.SEEK_SET)
            for chunk in chunks:
                write_all(self._fd, chunk)
            self._sync()
            os.pwrite(self._fd, npy_header(rows, stride), 0)
            self._sync()
            self._set(self.manifest.with_changes(rows=rows))
        except BaseException:
            os.pwrite(self._fd, npy_header(before.rows, stride), 0)
            os.ftruncate(self._fd, end)
            if before.state == "clean":
                with contextlib.suppress(OSError):  # dirty is the safe side
                    self._set(before)
            raise
        self.array = self._map()
        if self.keeper is not None:
            self.keeper.rows = self.array

    def _set(self, state: Manifest) -> None:
        if self.folder:
            replace_file(self.path / "manifest.json", manifests.encode(state))
        self.manifest = state

    def release(self) -> None:
        """Let go of the lock and the files; the mapping lives as long as an array shows it."""
        if self.keeper is not None:
            self.keeper.close()
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
