"""The journal of a table: rows as the last commit left them, written before they first change.

It knows the bytes of the journal and its two files, and nothing of tables. It is not safe for
threads: whoever owns it lets one in at a time.

::

    commit g ──begin──► record … record ──► commit g+1      the frames are worth nothing any more
                          │
                          └── the writer dies, or rolls back: Replay ──► rows of commit g

    undo0, undo1    the interval after commit g is kept in undo{g % 2}, from byte 0; the files are
                    used again and never cut, as blocks that were written before sync faster

        ┌─────────┬──────────────┬─────────┬─────┬──────────┬─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─
        │ frame 0 │ frame 1      │ frame 2 │  …  │ 64 zeros │ frames of older intervals
        └─────────┴──────────────┴─────────┴─────┴──────────┴─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─
         no rows: "it began"

    frame, little-endian; it begins at a multiple of 64 bytes, of 4096 with durability "power"
        byte 0    8s   "PYUNDO1\\n"
             8    u64  salt          of the interval, random
            16    u64  generation    g
            24    u64  sequence      0, 1, 2, … within the interval
            32    u64  settled       frames below this sequence were safe before this one was begun
            40    u32  size          bytes to the next frame
            44    u32  n             how many rows follow
            48    u32  stride        floats of a row
            52    u32  CRC-32C of the row numbers
            56    u32  CRC-32C of the old rows
            60    u32  CRC-32C of bytes 0..59
                64         row numbers, n int64
        64 + 8·n       old rows, n·stride float32; then zeros up to size

"Safe" is written with durability "process" (the page cache outlives the process), and synced with
"power". Invariants; the caller keeps the first three:

1. A row is changed only after `record` returned for it, and with "power" after `sync`.
2. A frame holds rows as commit g left them: a row is recorded before its first change, and not
   again (`Touched`). So frames may be applied in any order, twice, or again after a crash amid it.
3. `begin` is called once nothing needs what its file holds, and returns before the table says
   that it is dirty. So a dirty table without frame 0 has lost its journal.
4. A salt is drawn anew for each interval. So no older frame is taken for one of this interval
   (after a rollback the generation is the same), and no row that is recorded holds bytes that
   look like one: its bytes are older than the salt.
5. The zeros behind the last frame are written with it. So an end without them is not taken for
   the end.
6. With "power" no block of a synced frame is written again, so a torn write cannot harm it.
7. What cannot be recorded (a full disk) is an error before a row changes; so is everything after
   a sync that failed, as the system reports what it lost once.

What was made safe last (one frame; with "power" the frames of one sync) and loses bytes later
looks as if a crash had cut it short. Any other loss shows in `settled` of the frames behind it.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pyembed import _core
from pyembed._checks import F32, FLOAT32, INT64
from pyembed.errors import ArgumentError, FormatError, TableError
from pyembed.storage.fs import OPEN_FLAGS, allocate, sync, sync_folder, write_at

I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

MAGIC = b"PYUNDO1\n"
UNIT = 64  # bytes: a header, and what frames begin at a multiple of
BLOCK = 4096  # what a device may tear when it writes a part of it
FIELDS = struct.Struct("<8s4Q5I")  # of the header, without its own checksum
# Of a frame of more than one row: gathered, summed and sent in the cache. Rows of 768 bytes into
# ext4, checksum left out, EPYC 9005: frames of 64 KiB 3.4 GB/s, of 1 MiB 5.3, of 16 MiB 4.3.
FRAME_BYTES = 1 << 20
FIRST_BYTES = 64 << 10  # of a new file; then it doubles
GROWTH_BYTES = 64 << 20  # at most, of one allocation
AHEAD_BYTES = 32 << 20  # that a replay asks for
SCAN_BYTES = 1 << 20  # of what is read at once behind the last frame
ZEROS = bytes(BLOCK + UNIT)
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def undo_path(folder: Path, generation: int) -> Path:
    """Where the frames after this generation are."""
    return folder / f"undo{generation % 2}"


class _Header(NamedTuple):
    salt: int
    generation: int
    sequence: int
    settled: int
    size: int
    n: int
    stride: int
    rows_crc: int
    old_crc: int


class _Old(Protocol):
    def __getitem__(self, part: slice, /) -> F32: ...


def _pack(header: _Header) -> bytes:
    body = FIELDS.pack(MAGIC, *header)
    return body + _crc(body).to_bytes(4, "little")


def _unpack(data: bytes) -> _Header | None:
    """None for what is no header."""
    if len(data) != UNIT or not data.startswith(MAGIC):
        return None
    if _crc(data[: FIELDS.size]) != int.from_bytes(data[FIELDS.size :], "little"):
        return None
    return _Header(*FIELDS.unpack_from(data)[1:])


def _crc(data: Any) -> int:
    return _core.crc32c(data)


def _crc_of_each(data: U8, size: int, threads: int) -> list[int]:
    return _core.crc32c_pieces(data, size, threads)


def _bytes_of(array: NDArray[Any]) -> U8:
    return array.reshape(-1).view(np.uint8)


class Journal:
    """Writes the frames of one interval after the other.

    Parameters
    ----------
    folder : Path
    stride : int
        Floats of a row.
    durability : {"process", "power"}
        What a frame is safe from; with "power" once `sync` has returned.

    Attributes
    ----------
    path : Path
        The file of this interval.
    frames : int
        Of this interval, the one without rows included; 0 before `begin`.
    bytes_written : int
        Since this object was made.
    failed_sync : bool
        Whether a sync failed, or was interrupted: what was recorded may be lost.
    """

    def __init__(self, folder: Path, stride: int, durability: str = "process") -> None:
        self._folder, self._stride = folder, stride
        self._power = durability == "power"
        self._fds = [-1, -1]  # kept open: a file opened anew need not hear of a failed write
        self._fd = -1
        self._salt = self._generation = self._at = self._allocated = self._settled = self._sent = 0
        self.failed_sync = False
        self.path = folder
        self.frames = self.bytes_written = 0

    def begin(self, generation: int, salt: int) -> None:
        """Start the interval after a commit: invariants 3 and 4 say when, and with what salt.

        Raises
        ------
        TableError
            If the disk is full, or a sync failed before.
        """
        self._require_sound()
        self.frames = 0
        self.path = undo_path(self._folder, generation)
        which = generation % 2
        if self._fds[which] < 0:
            self._fds[which] = self._open()
            if self._power:
                self._make_durable(sync_folder, self._folder)
        self._fd = self._fds[which]
        self._allocated = os.fstat(self._fd).st_size
        self._salt, self._generation = salt, generation
        self._at = self._settled = self._sent = 0
        self._append(np.zeros(0, np.int64), np.zeros((0, self._stride), np.float32), _crc(b""))
        if self._power:
            self.sync()

    def _open(self) -> int:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | OPEN_FLAGS, 0o666)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise FormatError(f"{self.path}: not a regular file; remove it")
        return fd

    def record(self, rows: I64, old: _Old, threads: int = 1) -> None:
        """Append rows as they are before their first change, in frames of bounded size.

        If it fails, the rows count as not recorded. Frames of them that were written do no harm:
        they say what the rows still are.

        Parameters
        ----------
        rows : int64 array of shape (n,)
            None of them recorded in this interval.
        old : float32 array of shape (n, stride)
            C-contiguous; or what gives one for each slice of 0..n, and may use its memory again.
        threads : int
            That sum them.

        Raises
        ------
        TableError
            If the disk is full, or a sync failed before.
        """
        self._require_sound()
        if not self.frames:
            raise ArgumentError("record before begin")
        frame = max(1, FRAME_BYTES // (8 + 4 * self._stride))
        some = frame * threads  # that are gathered and summed together
        for start in range(0, rows.size, some):
            numbers = rows[start : start + some]
            floats = old[start : start + numbers.size]
            self._check(numbers, floats)
            sums = _crc_of_each(_bytes_of(floats), 4 * self._stride * frame, threads)
            for k, crc in enumerate(sums):
                part = slice(k * frame, (k + 1) * frame)
                self._append(numbers[part], floats[part], crc)

    def _check(self, rows: I64, old: F32) -> None:
        if rows.dtype != INT64 or old.dtype != FLOAT32 or old.shape != (rows.size, self._stride):
            what = f"{rows.dtype} {rows.shape} and {old.dtype} {old.shape}"
            raise ArgumentError(f"{what}; expected int64 (n,) and float32 (n, {self._stride})")

    def _append(self, rows: I64, old: F32, old_crc: int) -> None:
        payload = (_bytes_of(rows), _bytes_of(old))
        used = UNIT + payload[0].nbytes + payload[1].nbytes
        block = BLOCK if self._power else UNIT
        size = -(-used // block) * block
        header = _Header(
            salt=self._salt,
            generation=self._generation,
            sequence=self.frames,
            settled=self._settled if self._power else self.frames,
            size=size,
            n=rows.size,
            stride=self._stride,
            rows_crc=_crc(payload[0]),
            old_crc=old_crc,
        )
        tail = ZEROS[: size - used + UNIT]
        try:
            self._allocate(self._at + size + UNIT)
            write_at(self._fd, [_pack(header), *payload, tail], self._at)
        except OSError as error:
            if error.errno not in FULL or isinstance(error, TableError):
                raise
            what = f"{error.strerror}: the journal cannot grow, so no row was changed; make room"
            raise TableError(error.errno, what, str(self.path)) from None
        # Only now: a frame that was cut short is written over by the next.
        self._at += size
        self.frames += 1
        self.bytes_written += used + len(tail)

    def _allocate(self, end: int) -> None:
        """Have space up to here; more of it than that if there is, to allocate rarely."""
        have = self._allocated
        if end <= have:
            return
        ahead = max(end, FIRST_BYTES, have + min(have, GROWTH_BYTES))
        try:
            allocate(self._fd, have, ahead - have, self.path)
        except TableError:
            ahead = end
            allocate(self._fd, have, ahead - have, self.path)
        self._allocated = ahead

    def sync(self) -> None:
        """Make what was recorded outlive the machine. The first failure is final.

        Raises
        ------
        OSError
        """
        self._require_sound()
        self._make_durable(sync, self._fd)
        self._settled = self.frames

    def start_write_back(self) -> None:
        """Have what is not on its way to the disk yet begin to go there."""
        begun, self._sent = self._sent, self._at
        if begun < self._sent:
            _core.start_write_back(self._fd, begun, self._sent - begun)

    def _make_durable(self, syncing: Callable[[Any], None], what: int | Path) -> None:
        try:
            syncing(what)
        except BaseException:  # also where it was interrupted: a second try would prove nothing
            self.failed_sync = True
            raise

    def _require_sound(self) -> None:
        if self.failed_sync:
            what = "a sync of the journal failed; close the table, and open it again to recover"
            raise TableError(errno.EIO, what, str(self.path))

    def close(self) -> None:
        """Let go of the files. What is in them stays."""
        fds, self._fds, self._fd, self.frames = self._fds, [-1, -1], -1, 0
        for fd in fds:
            if fd >= 0:
                os.close(fd)


def _ask(fd: int, at: int, size: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, at, size, os.POSIX_FADV_WILLNEED)


class _End(Exception):
    """Why a replay stops: `end` and `problem`."""


class Replay:
    """Reads the frames of one interval: an iterable of (rows, old) for each frame with rows.

    It stops at the first frame that is not valid. What the end was is known after the iteration:

    - "complete": the zeros that are written behind the last frame.
    - "torn": a frame that was being written when the writer died. No row of it was changed.
    - "damaged": a frame is lost that was safe once, or never was of this table. The rows cannot
      be brought back to the commit.

    To refuse before a row is touched, iterate twice: once for `end`, once to apply. Each iteration
    begins anew, and holds one frame in memory.

    Parameters
    ----------
    path : Path
    salt, generation : int
        Of the interval.
    stride, rows : int
        Shape of the table at the commit.

    Attributes
    ----------
    end : {"unread", "complete", "torn", "damaged"}
    problem : str
        What is wrong, if it is not complete.
    frames, bytes : int
        Valid ones so far.
    """

    def __init__(self, path: Path, salt: int, generation: int, stride: int, rows: int) -> None:
        self.path, self._stride, self._rows = path, stride, rows
        self._interval = (salt, generation)
        self.end, self.problem = "unread", ""
        self.frames = self.bytes = self._asked = 0

    def __iter__(self) -> Iterator[tuple[I64, F32]]:
        self.end, self.problem = "unread", ""
        self.frames = self.bytes = self._asked = 0
        fd = -1
        try:
            fd = os.open(self.path, os.O_RDONLY | OPEN_FLAGS)
            while True:
                rows, old = self._next(fd)
                if rows.size:
                    yield rows, old
        except FileNotFoundError:
            self.end, self.problem = "damaged", f"{self.path}: it is missing"
        except _End as end:
            self.end, self.problem = end.args[0], end.args[1] and f"{self.path}: {end.args[1]}"
        finally:
            if fd >= 0:
                os.close(fd)

    def _next(self, fd: int) -> tuple[I64, F32]:
        if self.bytes >= self._asked:  # the system's own read-ahead is a third as fast
            self._asked = self.bytes + AHEAD_BYTES // 2
            _ask(fd, self.bytes, AHEAD_BYTES)
        data = os.pread(fd, UNIT, self.bytes)
        header = _unpack(data)
        if header is None or (*self._interval, self.frames) != header[:3]:
            raise self._judge(fd, data == ZEROS[:UNIT])
        here = f"frame {self.frames} at byte {self.bytes}"
        used = UNIT + header.n * (8 + 4 * header.stride)
        if header.stride != self._stride or header.size < used or header.size % UNIT:
            raise _End("damaged", f"{here} is of another table")
        payload = np.empty(used - UNIT, np.uint8)
        whole = os.preadv(fd, [payload.data], self.bytes + UNIT) == payload.size
        numbers, floats = payload[: 8 * header.n], payload[8 * header.n :]
        if not whole or (_crc(numbers), _crc(floats)) != (header.rows_crc, header.old_crc):
            raise self._judge(fd, False)
        rows, old = numbers.view(np.int64), floats.view(np.float32)
        if rows.size and not (rows.min() >= 0 and rows.max() < self._rows):
            raise _End("damaged", f"{here} has rows outside 0..{self._rows - 1}")
        self.frames += 1
        self.bytes += header.size
        return rows, old.reshape(header.n, self._stride)

    def _judge(self, fd: int, zeros: bool) -> _End:
        """There is no valid frame here: what does that mean?"""
        if self.frames == 0:
            return _End("damaged", "it does not begin with a frame of this interval")
        here, later = f"frame {self.frames} at byte {self.bytes}", self._settled_after(fd)
        if later is not None:
            return _End("damaged", f"{here} is lost, and was safe before that at byte {later}")
        return _End("complete", "") if zeros else _End("torn", f"{here} was being written")

    def _settled_after(self, fd: int) -> int | None:
        """The first later frame of this interval that was begun when the one here was safe."""
        end, salt = os.fstat(fd).st_size, np.uint64(self._interval[0])
        for start in range(self.bytes + UNIT, end, SCAN_BYTES):
            data = os.pread(fd, SCAN_BYTES, start)
            words = np.frombuffer(data, np.uint64, len(data) // UNIT * UNIT // 8).reshape(-1, 8)
            for unit in np.flatnonzero(words[:, 1] == salt):
                header = _unpack(data[UNIT * unit : UNIT * (unit + 1)])
                if header and header[:2] == self._interval and header.settled > self.frames:
                    return int(start + UNIT * unit)
        return None
