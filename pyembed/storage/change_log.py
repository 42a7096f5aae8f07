"""The log of changes: which rows may differ between two commits, also after the writer has ended.

::

    changes     record  record  …  record        each from one commit to a later one

    record      one part for each range of 2^24 rows in which some were touched, then the end
    part        "ROWS", n, range;  n u32 (which bytes of the range's bits), n u8 (the bytes)
                "BITS", n, range;  n u8 (its bits up to the last; bit 0 of byte 0: its first row)
    end         "DONE", n, the table's rows at the first commit, CRC-32C of the parts' headers;
                n (u64 generation, u64 commit): every commit from the first to the last, both

    header of each, little-endian, 36 bytes
        byte 0    4s   what it is
             4    u32  n
             8    u64  number of the range
            16    u64  rows
            24    u32  CRC-32C of the headers of the record's parts
            28    u32  CRC-32C of what follows the header
            32    u32  CRC-32C of bytes 0..31

It is an optimisation, and never trusted further than it proves. Invariants:

1. A record is written before the manifest that names its last commit. So one whose last commit no
   manifest names was left by a writer that died, and is written over.
2. A commit has a random number of its own. So records chain without a gap up to the commit of the
   manifest, or what lies before the gap is not known.
3. Nothing is believed that a checksum does not prove, and to not know is an answer: export it all.
4. Rows that a record names may be the same at both commits; those that it does not name are.
5. Old records are merged, so that there are never more than `MOST`. What was changed since one of
   the last `EXACT` commits stays exact; for an older one there may be rows of twice as many
   commits.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyembed import _core
from pyembed.errors import ArgumentError
from pyembed.storage.dirty_rows import RANGE_BYTES, RANGE_ROWS
from pyembed.storage.fs import OPEN_FLAGS, replace_file, sync, write_at
from pyembed.storage.manifest import MAX_ROWS, Manifest

FILE = "changes"
HEADER = struct.Struct("<4sIQQII")  # without its own checksum
UNIT = HEADER.size + 4
WIDTH = {b"ROWS": 5, b"BITS": 1, b"DONE": 16}  # bytes of one of n
EXACT = 16  # of the last commits
MOST = 64  # records; then they are merged: every two span more than what came later, so 40 stay
KEPT = 1 << 16  # commits: what is older is forgotten

I64 = NDArray[np.int64]
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]
Part = tuple[int, U32, U8]  # number of the range, bytes that are not zero, these
Commit = tuple[int, int]  # generation, and the commit's own number


class _Header(NamedTuple):
    kind: bytes
    n: int
    number: int
    rows: int
    headers_crc: int
    crc: int


class _Record(NamedTuple):
    """Where a record lies: (header, place of what follows) of its parts, its commits, its end."""

    parts: list[tuple[_Header, int]]
    commits: list[Commit]
    rows: int
    end: int


class Damaged(Exception):
    """A part is not what its checksum says."""


def commit_of(state: Manifest) -> Commit:
    return state.generation, int(state.commit or "0", 16)


# --- bytes --------------------------------------------------------------------------------------


def _entry(kind: bytes, n: int, data: bytes, number: int = 0, rows: int = 0, crc: int = 0) -> bytes:
    header = HEADER.pack(kind, n, number, rows, crc, _core.crc32c(data))
    return header + _core.crc32c(header).to_bytes(4, "little") + data


def encode(parts: Iterable[Part], rows: int, commits: list[Commit]) -> Iterator[bytes]:
    """The bytes of a record, a few megabytes at a time."""
    headers = b""
    for number, offsets, values in parts:
        used = int(offsets[-1]) + 1
        if offsets.nbytes + values.nbytes < used:
            entry = _entry(b"ROWS", offsets.size, offsets.tobytes() + values.tobytes(), number)
        else:
            bits = np.zeros(used, np.uint8)
            bits[offsets] = values
            entry = _entry(b"BITS", bits.size, bits.tobytes(), number)
        headers += entry[:UNIT]
        yield entry
    ends = np.array(commits, "<u8").tobytes()
    yield _entry(b"DONE", len(commits), ends, 0, rows, _core.crc32c(headers))


def _header(data: bytes) -> _Header | None:
    """None for what is no header."""
    if len(data) < UNIT:
        return None
    if _core.crc32c(data[: HEADER.size]) != int.from_bytes(data[HEADER.size :], "little"):
        return None
    return _Header(*HEADER.unpack_from(data))


def _read(fd: int, at: int = 0) -> list[_Record]:
    """The records from here to the first that is not whole; what parts hold is not looked at."""
    found, size = list[_Record](), os.fstat(fd).st_size
    parts, headers = list[tuple[_Header, int]](), b""
    while header := _header(data := os.pread(fd, UNIT, at)):
        length, at = WIDTH.get(header.kind, size) * header.n, at + UNIT
        if header.kind not in WIDTH or header.n == 0 or at + length > size:
            break
        if header.kind == b"DONE":
            payload = os.pread(fd, length, at)
            sums = (_core.crc32c(headers), _core.crc32c(payload))
            if sums != (header.headers_crc, header.crc):
                break
            commits = [(int(g), int(c)) for g, c in np.frombuffer(payload, "<u8").reshape(-1, 2)]
            found.append(_Record(parts, commits, header.rows, at + length))
            parts, headers = [], b""
        else:
            parts.append((header, at))
            headers += data
        at += length
    return found


def _chain(records: list[_Record], last: Commit) -> list[_Record]:
    """Those that lead up to a commit without a gap; none if it is not known."""
    ends = [record.commits[-1] for record in records]
    if last not in ends:
        return []
    chain = records[: len(ends) - ends[::-1].index(last)]
    for i in range(len(chain) - 1, 0, -1):
        if chain[i].commits[0] != chain[i - 1].commits[-1]:
            return chain[i:]
    return chain


def _union(fd: int, records: list[_Record]) -> Iterator[Part]:
    """The parts of several records as those of one, in the memory of one.

    Raises
    ------
    Damaged
    """
    places: dict[int, list[tuple[_Header, int]]] = {}
    for record in records:
        for header, at in record.parts:
            places.setdefault(header.number, []).append((header, at))
    for number in sorted(places):
        bits = np.zeros(RANGE_BYTES, np.uint8)
        for header, at in places[number]:
            data = os.pread(fd, WIDTH[header.kind] * header.n, at)
            if _core.crc32c(data) != header.crc or number >= MAX_ROWS // RANGE_ROWS:
                raise Damaged
            offsets, values = np.arange(header.n), np.frombuffer(data, np.uint8)[-header.n :]
            if header.kind == b"ROWS":
                offsets = np.frombuffer(data, "<u4", header.n)
            if offsets.max() >= RANGE_BYTES:
                raise Damaged
            bits[offsets] |= values
        used = np.flatnonzero(bits)
        yield number, used.astype(np.uint32), bits[used]


# --- writing --------------------------------------------------------------------------------------


class Changes:
    """Writes the log of a table, for its one writer.

    Parameters
    ----------
    folder : Path
    durability : {"process", "power"}
        With "power" the log is synced, so that it outlives the machine as well.
    """

    def __init__(self, folder: Path, durability: str) -> None:
        self.path = folder / FILE
        self._power = durability == "power"
        self._records: list[_Record] | None = None  # in the file, if that is known

    def append(self, before: Manifest, after: Manifest, parts: Iterable[Part]) -> None:
        """Before a manifest commits: what was touched since the one before it.

        What cannot be written is not known later: no commit fails for it.
        """
        records, self._records = self._records, None
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | OPEN_FLAGS, 0o666)
            try:
                records = _chain(_read(fd) if records is None else records, commit_of(before))
                ends = [commit_of(before), commit_of(after)]
                start = records[-1].end if records else 0
                self._write(fd, encode(parts, before.rows, ends), start)
                records += _read(fd, start)
                if len(records) > MOST:
                    self._merge(fd, records)
                else:
                    self._records = records
            finally:
                os.close(fd)
        except OSError:
            pass

    def _write(self, fd: int, entries: Iterable[bytes], at: int) -> None:
        for entry in entries:
            write_at(fd, [entry], at)
            at += len(entry)
        if os.fstat(fd).st_size > at:
            os.ftruncate(fd, at)
        if self._power:
            sync(fd)

    def _merge(self, fd: int, records: list[_Record]) -> None:
        """Write the file anew, with the older records merged; or empty, if one is damaged."""
        try:
            replace_file(self.path, (e for group in _groups(records) for e in _merged(fd, group)))
        except Damaged:
            replace_file(self.path, [])


def _merged(fd: int, group: list[_Record]) -> Iterator[bytes]:
    commits = [group[0].commits[0], *(c for record in group for c in record.commits[1:])]
    return encode(_union(fd, group), group[0].rows, commits)


def _groups(records: list[_Record]) -> list[list[_Record]]:
    """Records to be merged with each other: those of as many commits as came later, at most."""
    groups, age, after = list[list[_Record]](), 0, 0
    for record in reversed(records):
        if age >= KEPT:
            break
        age += len(record.commits) - 1
        if groups and after >= EXACT and age - after <= after:
            groups[0].insert(0, record)
        else:
            groups.insert(0, [record])
            after = age - len(record.commits) + 1  # commits later than those of the group
    return groups


# --- reading --------------------------------------------------------------------------------------


class Since:
    """Which rows may differ between an earlier commit and the last.

    Parameters
    ----------
    folder : Path
        With the log.
    state : Manifest
        The last commit.
    generation : int
        The earlier one.

    Attributes
    ----------
    commit : Commit
        The earlier one.

    Raises
    ------
    ArgumentError
        If it is not known.
    """

    def __init__(self, folder: Path, state: Manifest, generation: int) -> None:
        self.path, self._state = folder / FILE, state
        self._records = self._known()
        last = commit_of(state)
        starts = [r for r in self._records if generation in [g for g, _ in r.commits[:-1]]]
        if generation == last[0]:
            self.commit, self._records = last, []
        elif starts:
            self.commit = next(c for c in starts[-1].commits if c[0] == generation)
            self._records = self._records[self._records.index(starts[-1]) :]
        else:
            oldest = self._records[0].commits[0][0] if self._records else last[0]
            raise ArgumentError(
                f"{folder}: which rows changed since generation {generation} is not known; "
                f"allowed: {oldest}..{last[0]}; or export the whole table"
            )

    def _known(self) -> list[_Record]:
        try:
            fd = os.open(self.path, os.O_RDONLY | OPEN_FLAGS)
        except FileNotFoundError:
            return []
        try:
            return _chain(_read(fd), commit_of(self._state))
        finally:
            os.close(fd)

    @property
    def rows_before(self) -> int:
        """From this row on, all are new: of the earlier commit, or of one before it."""
        return self._records[0].rows if self._records else self._state.rows

    def rows(self) -> Iterator[I64]:
        """Row numbers, ascending, some millions at a time.

        Raises
        ------
        ArgumentError
            If the log is damaged.
        """
        for number, offsets, values in self._parts():
            bits = np.unpackbits(values, bitorder="little").reshape(-1, 8)
            where, bit = np.nonzero(bits)
            rows = RANGE_ROWS * number + 8 * offsets[where].astype(np.int64) + bit
            yield rows[: np.searchsorted(rows, self.rows_before)]
        for first in range(self.rows_before, self._state.rows, RANGE_ROWS):
            yield np.arange(first, min(first + RANGE_ROWS, self._state.rows))

    def save(self, folder: Path) -> None:
        """Write what is known as a log of one record into a new folder, durably."""
        ends = [self.commit, commit_of(self._state)]
        replace_file(folder / FILE, encode(self._parts(), self.rows_before, ends))

    def _parts(self) -> Iterator[Part]:
        if not self._records:
            return
        fd = os.open(self.path, os.O_RDONLY | OPEN_FLAGS)
        try:
            yield from _union(fd, self._records)
        except Damaged:
            raise ArgumentError(
                f"{self.path}: it is damaged, so it is not known which rows changed; "
                "export the whole table"
            ) from None
        finally:
            os.close(fd)
