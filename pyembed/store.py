"""The files of a table: create, map, lock, sync, grow. The only file that maps and syncs.

A table is a folder::

    rows.npy        float32, C order, shape (rows, stride), header padded to 4096 bytes
    manifest.json   the committed state, see manifest.py
    lock            held by flock: exclusively by a writer, shared by readers

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
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pyembed import manifest as manifests
from pyembed.arrays import F32, FLOAT32
from pyembed.errors import DirtyError, FormatError, LockedError, ReadOnlyError, TableError
from pyembed.manifest import Manifest

# So that rows start on a page, and a row whose size divides a page stays on one.
HEADER_BYTES = 4096
PIECE_BYTES = 8 << 20  # of a table that is being made, per write
WRITERS = 2  # of them under way: 1 leaves the disk waiting, 4 gains nothing


def sync(fd: int) -> None:
    """Make what was written to `fd` durable. Every sync of the library passes here."""
    os.fsync(fd)


def npy_header(rows: int, stride: int) -> bytes:
    """The .npy v1.0 header of a table's rows, HEADER_BYTES long."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {stride}), }}"
    prefix = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
    return prefix + text.encode().ljust(HEADER_BYTES - 11) + b"\n"


def read_npy_header(path: Path, fd: int) -> tuple[int, int, int]:
    """(rows, stride, offset of the data) of an .npy file of float32 rows.

    Raises
    ------
    FormatError
        If it is no 2-D C-order little-endian float32 array, or is shorter than it says.
    """
    try:
        with open(fd, "rb", closefd=False) as file:
            file.seek(0)
            version = np.lib.format.read_magic(file)
            reader = {(1, 0): np.lib.format.read_array_header_1_0}.get(
                version, np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = reader(file)
            offset = file.tell()
    except ValueError as error:
        raise FormatError(f"{path}: not an .npy file ({error})") from None
    if dtype != FLOAT32 or dtype.byteorder == ">" or len(shape) != 2 or (fortran and shape[0] > 1):
        order = "Fortran" if fortran else "C"
        raise FormatError(
            f"{path}: {dtype} of shape {shape} in {order} order; allowed: 2-D float32 in C order; "
            "convert with np.save(path, np.ascontiguousarray(array, '<f4'))"
        )
    size, needed = os.fstat(fd).st_size, offset + 4 * shape[0] * shape[1]
    if size < needed:
        raise FormatError(f"{path}: {size} bytes; its header asks for {needed}: it was cut short")
    return shape[0], shape[1], offset


def anonymous(rows: int, stride: int) -> F32:
    """Zeroed rows in memory, page-aligned and on huge pages where the system grants them."""
    size = 4 * rows * stride
    if size == 0:
        return np.zeros((rows, stride), np.float32)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(rows, stride)


def allocate(fd: int, offset: int, size: int, path: Path) -> None:
    """Reserve disk space, so that a full disk is an error here and not a signal later.

    Raises
    ------
    TableError
        If the disk has not enough space (errno ENOSPC).
    """
    if size == 0:
        return
    before = os.fstat(fd).st_size
    try:
        os.posix_fallocate(fd, offset, size)
    except OSError as error:
        os.ftruncate(fd, before)
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        raise TableError(
            error.errno,
            f"{error.strerror}: the table needs {size:,} more bytes, {free:,} are free; "
            "make room or choose another disk",
            str(path),
        ) from None


def write_all(fd: int, data: Any) -> None:
    """os.write until everything is written."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        sync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """Atomically replace a file: temporary file, sync, rename, sync of the folder."""
    temporary = path.with_name(path.name + ".new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        write_all(fd, data)
        sync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)
    sync_folder(path.parent)


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
        with _DirectWriter(fd, path) as writer:
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


class _DirectWriter:
    """Writes a file from its start, past the page cache, while the next bytes are made.

    Through the page cache a new table would be copied once more, would push everybody else's pages
    out, and would stall at the system's limit of unwritten pages. Where the file system takes no
    O_DIRECT, the same pieces are written in the usual way.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        try:
            self._direct = os.open(path, os.O_WRONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
        except OSError:
            self._direct = os.dup(fd)
        self._pool = ThreadPoolExecutor(WRITERS, "pyembed-write")
        self._piece = mmap.mmap(-1, PIECE_BYTES)  # being filled; page-aligned, as O_DIRECT wants
        self._free = [mmap.mmap(-1, PIECE_BYTES) for _ in range(WRITERS)]
        self._writing: deque[tuple[Future[None], mmap.mmap]] = deque()
        self._at = self._filled = 0  # where the piece begins in the file, and how full it is

    def write(self, data: Any) -> None:
        """Take more bytes; what they were made in may be used again at once."""
        view = memoryview(data).cast("B")
        while view:
            take = min(len(view), PIECE_BYTES - self._filled)
            self._piece[self._filled : self._filled + take] = view[:take]
            self._filled += take
            view = view[take:]
            if self._filled == PIECE_BYTES:
                self._send()

    def _send(self) -> None:
        task = self._pool.submit(_write_at, self._direct, memoryview(self._piece), self._at)
        self._writing.append((task, self._piece))
        self._at, self._filled = self._at + PIECE_BYTES, 0
        if not self._free:
            task, piece = self._writing.popleft()
            task.result()
            self._free.append(piece)
        self._piece = self._free.pop()

    def __enter__(self) -> _DirectWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._pool.shutdown()  # waits
        try:
            if kind is None:
                for task, _ in self._writing:
                    task.result()
                # The last piece is no multiple of a block.
                _write_at(self._fd, memoryview(self._piece)[: self._filled], self._at)
        finally:
            os.close(self._direct)


def _write_at(fd: int, view: memoryview, at: int) -> None:
    while view:
        count = os.pwrite(fd, view, at)
        view, at = view[count:], at + count


class Store:
    """An open table: its mapping, its lock, its manifest.

    Attributes
    ----------
    path : Path
    mode : {"r", "r+", "c"}
        Read; read and write; write to a private copy that never reaches the file.
    manifest : Manifest
    array : float32 array of shape (rows, stride)
        The mapping.
    """

    def __init__(self, path: Path, mode: str, live: bool = False, salvage: bool = False) -> None:
        self.path, self.mode = path, mode
        self.folder = path.is_dir()
        self._lock_fd = self._fd = -1
        flags = (os.O_RDWR if mode == "r+" else os.O_RDONLY) | os.O_CLOEXEC
        try:
            file = path / "rows.npy" if self.folder else path
            self._lock_fd = os.open(path / "lock" if self.folder else path, flags)
            if not live:
                self._take_lock()
            self._fd = os.open(file, flags)
            self.manifest, self._offset = self._read_state(file, live, salvage)
            self.array = self._map()
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
        if (rows, stride, offset, size) != (state.rows, state.stride, HEADER_BYTES, expected):
            raise FormatError(
                f"{file}: {size} bytes with a header of {offset} for ({rows}, {stride}); its "
                f"manifest asks for {expected} with {HEADER_BYTES} for "
                f"({state.rows}, {state.stride}): "
                "it was cut short, or is of another table; restore it from a copy"
            )
        return state, offset

    def _map(self) -> F32:
        rows, stride = self.manifest.rows, self.manifest.stride
        access = {"r": mmap.ACCESS_READ, "r+": mmap.ACCESS_WRITE, "c": mmap.ACCESS_COPY}[self.mode]
        if rows == 0:
            return np.zeros((0, stride), np.float32)
        memory = mmap.mmap(self._fd, self._offset + 4 * rows * stride, access=access)
        if hasattr(mmap, "MADV_RANDOM"):
            # The system's read-ahead would read megabytes for one cold row.
            memory.madvise(mmap.MADV_RANDOM)
        flat = np.frombuffer(memory, np.float32, rows * stride, self._offset)
        return flat.reshape(rows, stride)

    def mark_dirty(self) -> None:
        """Before the first change after a commit: say in the manifest that rows are changing.

        Raises
        ------
        ReadOnlyError
            If the table was opened for reading.
        """
        if self.mode == "r":
            raise ReadOnlyError(
                errno.EROFS, 'the table is open for reading; open it with mode="r+"', str(self.path)
            )
        if self.manifest.state == "clean" and self.mode == "r+":
            self._set(self.manifest.with_changes(state="dirty"))

    def commit(self, meta: dict[str, Any] | None) -> None:
        """Sync the rows, then say so in the manifest."""
        if self.mode != "r+":
            self.mark_dirty()  # raises for a reader
            return
        if self.manifest.state == "clean" and meta is None:
            return
        state = self.manifest.with_changes(
            state="clean",
            generation=self.manifest.generation + 1,
            meta=self.manifest.meta if meta is None else meta,
        )
        manifests.encode(state)  # a meta that cannot be stored is refused before anything is synced
        sync(self._fd)
        self._set(state)

    def append(self, chunks: Iterable[F32], count: int) -> None:
        """Add `count` rows at the end: allocate, write, sync; then header and manifest."""
        rows, stride = self.manifest.rows, self.manifest.stride
        if self.mode != "r+" or not self.folder:
            raise ReadOnlyError(
                errno.EROFS, 'append needs a table folder open "r+"', str(self.path)
            )
        end = HEADER_BYTES + 4 * rows * stride
        allocate(self._fd, end, 4 * count * stride, self.path / "rows.npy")
        try:
            os.lseek(self._fd, end, os.SEEK_SET)
            for chunk in chunks:
                write_all(self._fd, chunk)
            sync(self._fd)
        except BaseException:
            os.ftruncate(self._fd, end)
            raise
        self.mark_dirty()
        os.pwrite(self._fd, npy_header(rows + count, stride), 0)
        sync(self._fd)
        self._set(self.manifest.with_changes(rows=rows + count))
        self.array = self._map()

    def _set(self, state: Manifest) -> None:
        if self.folder:
            replace_file(self.path / "manifest.json", manifests.encode(state))
        self.manifest = state

    def release(self) -> None:
        """Let go of the lock and the files; the mapping lives as long as an array shows it."""
        for fd in (self._fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock_fd = -1

    def abandon(self) -> None:
        """The table was dropped, or is open at exit: no work is lost for a forgotten close."""
        if self.mode == "r+" and self.manifest.state == "dirty":
            message = f"{self.path} was not closed; its changes are committed now"
            warnings.warn(message, ResourceWarning, stacklevel=2)
            self.commit(None)
        self.release()
