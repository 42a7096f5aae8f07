"""The rollback journal of a table: rows as the last commit left them, written before they first
change.

This module knows the bytes of the journal and its two files, and nothing of tables. It is not safe
for threads: its owner takes a lock.

::

    commit g ──begin──► record … record ──► commit g+1      the frames are obsolete from here on
                          │
                          └── the writer dies, or rolls back: Replay ──► rows of commit g

    undo0, undo1    the transaction after commit g uses undo{g % 2}, from byte 0; the files are
                    used again and never cut, as blocks that were written before sync faster

        ┌─────────┬──────────────┬─────────┬─────┬──────────┬─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─
        │ frame 0 │ frame 1      │ frame 2 │  …  │ 64 zeros │ frames of older transactions
        └─────────┴──────────────┴─────────┴─────┴──────────┴─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─
         no rows: "it began"

    frame, little-endian; it begins at a multiple of 64 bytes, of 4096 with durability "power"
        byte 0    8s   "PYUNDO1\\n"
             8    u64  salt          of the transaction, random
            16    u64  generation    g
            24    u64  sequence      0, 1, 2, … within the transaction
            32    u64  settled       frames below this sequence were safe before this one was begun
            40    u32  size          bytes to the next frame
            44    u32  n             number of rows that follow
            48    u32  stride        floats of a row
            52    u32  CRC-32C of the row numbers
            56    u32  CRC-32C of the old rows
            60    u32  CRC-32C of bytes 0..59
                64         row numbers, n int64
        64 + 8·n       old rows, n·stride float32; then zeros up to size

With durability "process" a frame is safe once it is written (the system's page cache outlives the
process); with "power", once it is synced. Invariants; the caller keeps the first three:

1. A row is changed only after `record` returned for it, and with "power" after `sync`.
2. A frame holds rows as commit g left them: a row is recorded before its first change, and never
   again (`DirtyRows`). So frames may be applied in any order, twice, or again after a crash during
   recovery.
3. `begin` is called when no frame of its file is needed any more, and returns before the table says
   that it is dirty. So a dirty table without frame 0 has lost its journal.
4. Each transaction draws a new salt. So no older frame is taken for one of this transaction (after
   a rollback the generation is the same), and no recorded row holds bytes that look like one: its
   bytes are older than the salt.
5. The zeros behind the last frame are written with it. So an end without them is not taken for
   the end.
6. With "power" no block of a synced frame is written again, so a torn write cannot harm it.
7. If a row cannot be recorded (a full disk), the error comes before the row changes. After a failed
   sync every call fails, as the system reports only once that it lost data.

The frames that were made safe last (one frame; with "power" the frames of one sync) look as if a
crash had cut them short, if they lose bytes later. Any other loss shows in `settled` of the frames
behind it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pyembed import _core
from pyembed._checks import F32, FLOAT32, INT64
from pyembed.errors import ArgumentError, TableError
from pyembed.storage.fs import FULL, NO_LINK, File, Folder

I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

MAGIC = b"PYUNDO1\n"
FILES = ("undo0", "undo1")
UNIT = 64  # bytes of a header; frames begin at multiples of it
BLOCK = 4096  # a device may tear a block when it writes a part of it
FIELDS = struct.Struct("<8s4Q5I")  # the header without its own checksum
# Size of a frame of more than one row: it is gathered, summed and sent while it is in the cache.
# Rows of 768 bytes, ext4, without the checksum, EPYC 9005: frames of 64 KiB 3.4 GB/s, of 1 MiB 5.3,
# of 16 MiB 4.3.
FRAME_BYTES = 1 << 20
FIRST_BYTES = 64 << 10  # size of a new file; then it doubles
GROWTH_BYTES = 64 << 20  # at most, in one allocation
AHEAD_BYTES = 32 << 20  # readahead of a replay
SCAN_BYTES = 1 << 20  # read at once behind the last frame
ZEROS = bytes(BLOCK + UNIT)


def file_name(generation: int) -> str:
    """Return the name of the file with the frames after a generation."""
    return FILES[generation % 2]


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
    return body + _core.crc32c(body).to_bytes(4, "little")


def _unpack(data: bytes) -> _Header | None:
    """Return the header, or None if the bytes are not one."""
    if len(data) != UNIT or not data.startswith(MAGIC):
        return None
    if _core.crc32c(data[: FIELDS.size]) != int.from_bytes(data[FIELDS.size :], "little"):
        return None
    return _Header(*FIELDS.unpack_from(data)[1:])


def _bytes_of(array: NDArray[Any]) -> U8:
    return array.reshape(-1).view(np.uint8)


class Journal:
    """Writes the frames of one transaction after the other.

    Parameters
    ----------
    folder : Folder
    stride : int
        Floats of a row.
    durability : {"process", "power"}
        With "power" a frame is safe once `sync` has returned.

    Attributes
    ----------
    name : str
        The name of the file of this transaction.
    file : File
        That file.
    frames : int
        Number of frames of this transaction, the one without rows included; 0 before `begin`.
    bytes_written : int
        Since this object was made.
    failed_sync : bool
        Whether a sync failed, or was interrupted: recorded rows may be lost.
    """

    def __init__(self, folder: Folder, stride: int, durability: str = "process") -> None:
        self._folder, self._stride = folder, stride
        self._power = durability == "power"
        # Kept open: a newly opened file may not report a write that failed before.
        self._files = dict[str, File]()
        self.file = File(folder.system, -1, folder.path)  # the file of this transaction
        self._salt = self._generation = self._at = self._allocated = self._settled = self._sent = 0
        self.failed_sync = False
        self.name = ""
        self.frames = self.bytes_written = 0

    def begin(self, generation: int, salt: int) -> None:
        """Start the transaction after a commit; invariants 3 and 4 say when, and with which salt.

        Raises
        ------
        TableError
            If the disk is full, or a sync failed before.
        """
        self._require_sound()
        self.frames = 0
        self.name = file_name(generation)
        if self.name not in self._files:
            file = self._folder.open(self.name, os.O_RDWR | os.O_CREAT | NO_LINK)
            self._files[self.name] = file.require_regular()
            if self._power:
                self._make_durable(self._folder.sync)
        self.file = self._files[self.name]
        self._allocated = self.file.size
        self._salt, self._generation = salt, generation
        self._at = self._settled = self._sent = 0
        self._append(np.zeros(0, np.int64), np.zeros((0, self._stride), np.float32), 0)
        if self._power:
            self.sync()

    def record(self, rows: I64, old: _Old, threads: int = 1) -> None:
        """Append rows as they are before their first change, in frames of bounded size.

        If it fails, the rows count as not recorded. Frames of them that were written do no harm:
        they hold the content that the rows still have.

        Parameters
        ----------
        rows : int64 array of shape (n,)
            None of them was recorded in this transaction.
        old : float32 array of shape (n, stride)
            C-contiguous; or an object that returns one for each slice of 0..n, whose memory it may
            use again.
        threads : int
            Number of threads for the checksums.

        Raises
        ------
        TableError
            If the disk is full, or a sync failed before.
        """
        self._require_sound()
        if not self.frames:
            raise ArgumentError("record before begin")
        frame = max(1, FRAME_BYTES // (8 + 4 * self._stride))
        some = frame * threads  # rows that are gathered and summed together
        for start in range(0, rows.size, some):
            numbers = rows[start : start + some]
            floats = old[start : start + numbers.size]
            self._check(numbers, floats)
            sums = _core.crc32c_pieces(_bytes_of(floats), 4 * self._stride * frame, threads)
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
            rows_crc=_core.crc32c(payload[0]),
            old_crc=old_crc,
        )
        tail = ZEROS[: size - used + UNIT]
        try:
            self._allocate(self._at + size + UNIT)
            self.file.write_at([_pack(header), *payload, tail], self._at)
        except OSError as error:
            if error.errno not in FULL or isinstance(error, TableError):
                raise
            what = f"{error.strerror}: the journal cannot grow, so no row was changed; make room"
            raise TableError(error.errno, what, str(self.file.path)) from None
        # Only now: a frame that was cut short is overwritten by the next.
        self._at += size
        self.frames += 1
        self.bytes_written += used + len(tail)

    def _allocate(self, end: int) -> None:
        """Allocate space up to an offset, and more if the disk has it, so that this is rare."""
        have = self._allocated
        if end <= have:
            return
        ahead = max(end, FIRST_BYTES, have + min(have, GROWTH_BYTES))
        try:
            self.file.allocate(have, ahead - have)
        except TableError:
            ahead = end
            self.file.allocate(have, ahead - have)
        self._allocated = ahead

    def sync(self) -> None:
        """Sync the recorded rows, so that they survive a power cut. The first failure is final.

        Raises
        ------
        OSError
        """
        self._require_sound()
        self._make_durable(self.file.sync)
        self._settled = self.frames

    def start_write_back(self) -> None:
        """Start to write frames to the disk, from where the last call ended."""
        begun, self._sent = self._sent, self._at
        if begun < self._sent:
            self.file.system.start_write_back(self.file.fd, begun, self._sent - begun)

    def _make_durable(self, sync: Callable[[], None]) -> None:
        try:
            sync()
        except BaseException:  # also if it was interrupted: a second try would prove nothing
            self.failed_sync = True
            raise

    def _require_sound(self) -> None:
        if self.failed_sync:
            what = "a sync of the journal failed; close the table, and open it again to recover"
            raise TableError(errno.EIO, what, str(self._folder.path / self.name))

    def close(self) -> None:
        """Close the files. Their content stays."""
        files, self._files, self.frames = self._files, {}, 0
        for file in files.values():
            file.close()


class _End(Exception):
    """Why a replay stops: `end` and `problem`."""


class Replay:
    """Reads the frames of one transaction: an iterable of (rows, old) for each frame with rows.

    It stops at the first frame that is not valid. After the iteration `end` says why:

    - "complete": the zeros that are written behind the last frame.
    - "torn": a frame that was being written when the writer died. None of its rows was changed.
    - "damaged": a frame is lost that was safe once, or was never of this table. The rows cannot
      be brought back to the commit.

    To refuse before a row changes, iterate twice: once for `end`, once to apply. Each iteration
    starts from the first frame, and holds one frame in memory.

    Parameters
    ----------
    folder : Folder
    salt, generation : int
        Of the transaction.
    stride, rows : int
        Shape of the table at the commit.
    file : File, optional
        The journal, if it is open.

    Attributes
    ----------
    end : {"unread", "complete", "torn", "damaged"}
    problem : str
        What is wrong, if it is not complete.
    frames, bytes : int
        Valid ones so far.
    """

    def __init__(
        self,
        folder: Folder,
        salt: int,
        generation: int,
        stride: int,
        rows: int,
        file: File | None = None,
    ) -> None:
        self._folder, self._name, self._open = folder, file_name(generation), file
        self._stride, self._rows = stride, rows
        self._transaction = (salt, generation)
        self.end, self.problem = "unread", ""
        self.frames = self.bytes = self._ahead = 0

    def __iter__(self) -> Iterator[tuple[I64, F32]]:
        self.end, self.problem = "unread", ""
        self.frames = self.bytes = self._ahead = 0
        path = self._folder.path / self._name
        try:
            with contextlib.ExitStack() as opened:
                file = self._open or opened.enter_context(
                    self._folder.open(self._name, os.O_RDONLY | NO_LINK)
                )
                while True:
                    rows, old = self._next(file)
                    if rows.size:
                        yield rows, old
        except FileNotFoundError:
            self.end, self.problem = "damaged", f"{path}: it is missing"
        except _End as end:
            self.end, self.problem = end.args[0], end.args[1] and f"{path}: {end.args[1]}"

    def _next(self, file: File) -> tuple[I64, F32]:
        if self.bytes >= self._ahead:  # the system's own readahead is a third as fast
            self._ahead = self.bytes + AHEAD_BYTES // 2
            file.system.advise(file.fd, self.bytes, AHEAD_BYTES, "willneed")
        data = file.read_at(UNIT, self.bytes)
        header = _unpack(data)
        if header is None or (*self._transaction, self.frames) != header[:3]:
            raise self._judge(file, data == ZEROS[:UNIT])
        here = f"frame {self.frames} at byte {self.bytes}"
        used = UNIT + header.n * (8 + 4 * header.stride)
        if header.stride != self._stride or header.size < used or header.size % UNIT:
            raise _End("damaged", f"{here} is of another table")
        payload = np.empty(used - UNIT, np.uint8)
        whole = file.read_into(payload, self.bytes + UNIT) == payload.size
        numbers, floats = payload[: 8 * header.n], payload[8 * header.n :]
        sums = (_core.crc32c(numbers), _core.crc32c(floats))
        if not whole or sums != (header.rows_crc, header.old_crc):
            raise self._judge(file, False)
        rows, old = numbers.view(np.int64), floats.view(np.float32)
        if rows.size and not (rows.min() >= 0 and rows.max() < self._rows):
            raise _End("damaged", f"{here} has rows outside 0..{self._rows - 1}")
        self.frames += 1
        self.bytes += header.size
        return rows, old.reshape(header.n, self._stride)

    def _judge(self, file: File, zeros: bool) -> _End:
        """Decide what it means that there is no valid frame here: `end` and `problem`."""
        if self.frames == 0:
            return _End("damaged", "it does not begin with a frame of this transaction")
        here, later = f"frame {self.frames} at byte {self.bytes}", self._settled_after(file)
        if later is not None:
            return _End("damaged", f"{here} is lost, and was safe before that at byte {later}")
        return _End("complete", "") if zeros else _End("torn", f"{here} was being written")

    def _settled_after(self, file: File) -> int | None:
        """Find the first later frame of this transaction that proves the one here was safe."""
        salt = np.uint64(self._transaction[0])
        for start in range(self.bytes + UNIT, file.size, SCAN_BYTES):
            data = file.read_at(SCAN_BYTES, start)
            words = np.frombuffer(data, np.uint64, len(data) // UNIT * UNIT // 8).reshape(-1, 8)
            for unit in np.flatnonzero(words[:, 1] == salt):
                header = _unpack(data[UNIT * unit : UNIT * (unit + 1)])
                if header and header[:2] == self._transaction and header.settled > self.frames:
                    return int(start + UNIT * unit)
        return None
