"""Bytes to disk: sync, allocate, replace, write past the page cache; the header of .npy files.

The only file that syncs: every sync of the library passes `sync`, so that a test can count them,
fail them, or drop what came after the last one.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import tokenize
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pyembed import _core
from pyembed._checks import F32, FLOAT32
from pyembed.errors import FormatError, TableError

# So that rows start on a page, and a row whose size divides a page stays on one.
HEADER_BYTES = 4096
MAX_STRIDE = 1 << 24  # floats of a row: 256 columns of the widest kind
PIECE_BYTES = 8 << 20  # of a table that is being made, per write
NEAR = 0.75  # of the changed pages at which the system begins to write by itself
OPEN_FLAGS = os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)  # of a file that is nobody's link
WRITERS = 2  # of them under way: 1 leaves the disk waiting, 4 gains nothing
SUM_BYTES = 1 << 20  # of a file that have a checksum of their own


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
    except (ValueError, SyntaxError, tokenize.TokenError) as error:
        raise FormatError(f"{path}: not an .npy file ({error})") from None
    if dtype != FLOAT32 or dtype.byteorder == ">" or len(shape) != 2 or (fortran and shape[0] > 1):
        order = "Fortran" if fortran else "C"
        raise FormatError(
            f"{path}: {dtype} of shape {shape} in {order} order; allowed: 2-D float32 in C order; "
            "convert with np.save(path, np.ascontiguousarray(array, '<f4'))"
        )
    if shape[0] < 0 or not 1 <= shape[1] <= MAX_STRIDE or offset % 4:
        raise FormatError(
            f"{path}: shape {shape} at byte {offset}; allowed: rows of 1..{MAX_STRIDE} floats that "
            "begin at a multiple of 4 bytes"
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
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        raise TableError(
            errno.ENOMEM, f"a table of {size:,} bytes does not fit into memory; use Table.create"
        ) from None
    with contextlib.suppress(OSError, AttributeError):  # a hint; not every system has it
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(rows, stride)


def map_rows(fd: int, offset: int, rows: int, stride: int, access: int) -> F32:
    """Rows of a file that is long enough, which they begin at a byte of, as its pages."""
    if rows == 0:
        return np.zeros((0, stride), np.float32)
    memory = mmap.mmap(fd, offset + 4 * rows * stride, access=access)
    with contextlib.suppress(OSError, AttributeError):  # a hint; not every system has it
        # The system's read-ahead would read megabytes for one cold row.
        memory.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(memory, np.float32, rows * stride, offset).reshape(rows, stride)


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


def write_back_is_near() -> bool:
    """Whether the system is about to write changed pages of its own choice; False if unknown."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return False
    pages = dict(line.split() for line in lines)
    threshold = int(pages.get("nr_dirty_background_threshold", 0))
    return int(pages.get("nr_dirty", 0)) > NEAR * threshold > 0


def write_all(fd: int, data: Any) -> None:
    """os.write until everything is written."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def write_at(fd: int, parts: list[Any], at: int) -> None:
    """All parts, one after the other, from `at` on: os.pwritev until everything is written."""
    left = [memoryview(part) for part in parts if len(part)]
    while left:
        count = os.pwritev(fd, left, at)
        at += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        sync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, parts: Iterable[bytes]) -> None:
    """Atomically replace a file: temporary file, sync, rename, sync of the folder.

    What makes the parts may fail: the file is then as it was.

    Raises
    ------
    OSError
        With errno EIO if only the last failed: the file is the new one already, and a caller must
        not take that for a full disk, which is met before.
    """
    temporary = path.with_name(path.name + ".new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        for part in parts:
            write_all(fd, part)
        sync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)
    try:
        sync_folder(path.parent)
    except OSError as error:
        what = f"its new content may be lost with the machine ({error.strerror})"
        raise OSError(errno.EIO, what, str(path)) from error


class DirectWriter:
    """Writes a file from its start, past the page cache, while the next bytes are made.

    Through the page cache a new table would be copied once more, would push everybody else's pages
    out, and would stall at the system's limit of unwritten pages. Where the file system takes no
    O_DIRECT, the same pieces are written in the usual way.

    Attributes
    ----------
    sums : list of int
        See `block_sums`; of the whole file once the block has ended.
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
        self._writing: deque[tuple[Future[list[int]], mmap.mmap]] = deque()
        self.sums: list[int] = []
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
        task = self._pool.submit(_put, self._direct, memoryview(self._piece), self._at)
        self._writing.append((task, self._piece))
        self._at, self._filled = self._at + PIECE_BYTES, 0
        if not self._free:
            task, piece = self._writing.popleft()
            self.sums += task.result()
            self._free.append(piece)
        self._piece = self._free.pop()

    def __enter__(self) -> DirectWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._pool.shutdown()  # waits
        try:
            if kind is None:
                for task, _ in self._writing:
                    self.sums += task.result()
                # The last piece is no multiple of a block.
                self.sums += _put(self._fd, memoryview(self._piece)[: self._filled], self._at)
        finally:
            os.close(self._direct)


def _put(fd: int, view: memoryview, at: int) -> list[int]:
    write_at(fd, [view], at)
    return block_sums(view, at)


def block_sums(view: memoryview, at: int) -> list[int]:
    """CRC-32C of each MiB of a piece that begins at byte `at`, a multiple of that, of a file.

    The header is left out: it is compared with the manifest, and may be written last.
    """
    first = max(0, HEADER_BYTES - at)
    starts = range(0, len(view), SUM_BYTES)
    return [_core.crc32c(view[max(first, start) : start + SUM_BYTES]) for start in starts]
