"""The change log: which rows may differ between two commits, also after the writer has ended.

::

    changes     record  record  …  record        each from one commit to a later one

    record      one part for each range of 2^24 rows in which rows changed, then the end
    part        "ROWS", n, range;  n u32 (which bytes of the range's bits), n u8 (the bytes)
                "BITS", n, range;  n u8 (its bits up to the last; bit 0 of byte 0: its first row)
    end         "DONE", n, the table's rows at the first commit, CRC-32C of the parts' headers;
                n (u64 generation, u64 commit): every commit from the first to the last, both

    header of each, little-endian, 36 bytes
        byte 0    4s   kind
             4    u32  n
             8    u64  number of the range
            16    u64  rows
            24    u32  CRC-32C of the headers of the record's parts
            28    u32  CRC-32C of the payload that follows the header
            32    u32  CRC-32C of bytes 0..31

The log is an optimisation: without it, an export copies all rows. Invariants:

1. A record is written before the manifest that names its last commit. So a record whose last commit
   no manifest names was left by a writer that died, and is overwritten.
2. Each commit has a random number. So records chain without a gap up to the commit of the manifest,
   or the changes before the gap are unknown.
3. Bytes without a valid checksum are not used. The changes are then unknown: export all rows.
4. Rows that a record names may be the same at both commits; rows that it does not name are.
5. Old records are merged, so that there are never more than `MOST`. The changes since one of the
   last `EXACT` commits stay exact; for an older one, the answer may include the rows of twice as
   many commits.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyembed import _core
from pyembed.errors import ArgumentError
from pyembed.storage.dirty_rows import RANGE_BYTES, RANGE_ROWS
from pyembed.storage.fs import NO_LINK, File, Folder
from pyembed.storage.manifest import MAX_ROWS, Manifest

FILE = "changes"
HEADER = struct.Struct("<4sIQQII")  # without its own checksum
UNIT = HEADER.size + 4
WIDTH = {b"ROWS": 5, b"BITS": 1, b"DONE": 16}  # bytes of the payload for each of n
EXACT = 16  # commits, the last ones, whose records are not merged
MOST = 64  # records; then they are merged: two neighbours span more than all later ones: 40 stay
KEPT = 1 << 16  # commits; older ones are forgotten

I64 = NDArray[np.int64]
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]
Part = tuple[int, U32, U8]  # number of the range, positions of bytes that are not zero, the bytes
Commit = tuple[int, int]  # generation, and the random number of the commit


class _Header(NamedTuple):
    kind: bytes
    n: int
    number: int
    rows: int
    headers_crc: int
    crc: int


class _Record(NamedTuple):
    """A record of the file: (header, offset of the payload) of its parts, commits, its end."""

    parts: list[tuple[_Header, int]]
    commits: list[Commit]
    rows: int
    end: int


class Damaged(Exception):
    """A part does not match its checksum."""


def commit_of(state: Manifest) -> Commit:
    """Return the generation and the random number of a manifest's commit."""
    return state.generation, int(state.commit or "0", 16)


# --- bytes --------------------------------------------------------------------------------------


def _entry(kind: bytes, n: int, data: bytes, number: int = 0, rows: int = 0, crc: int = 0) -> bytes:
    header = HEADER.pack(kind, n, number, rows, crc, _core.crc32c(data))
    return header + _core.crc32c(header).to_bytes(4, "little") + data


def encode(parts: Iterable[Part], rows: int, commits: list[Commit]) -> Iterator[bytes]:
    """Yield the bytes of a record, a few megabytes at a time."""
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
    """Return the header, or None if the bytes are not one."""
    if len(data) < UNIT:
        return None
    if _core.crc32c(data[: HEADER.size]) != int.from_bytes(data[HEADER.size :], "little"):
        return None
    return _Header(*HEADER.unpack_from(data))


def _read(file: File, at: int = 0) -> list[_Record]:
    """Read records from an offset on, up to the first incomplete one; do not check payloads."""
    found, size = list[_Record](), file.size
    parts, headers = list[tuple[_Header, int]](), b""
    while header := _header(data := file.read_at(UNIT, at)):
        length, at = WIDTH.get(header.kind, size) * header.n, at + UNIT
        if header.kind not in WIDTH or header.n == 0 or at + length > size:
            break
        if header.kind == b"DONE":
            payload = file.read_at(length, at)
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
    """Return the records that lead to a commit without a gap; none if the commit is unknown."""
    ends = [record.commits[-1] for record in records]
    if last not in ends:
        return []
    chain = records[: len(ends) - ends[::-1].index(last)]
    for i in range(len(chain) - 1, 0, -1):
        if chain[i].commits[0] != chain[i - 1].commits[-1]:
            return chain[i:]
    return chain


def _union(file: File, records: list[_Record]) -> Iterator[Part]:
    """Yield the union of several records as the parts of one record, with one part in memory.

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
            data = file.read_at(WIDTH[header.kind] * header.n, at)
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


class ChangeLog:
    """Writes the change log of a table, for its one writer.

    Parameters
    ----------
    folder : Folder
    durability : {"process", "power"}
        With "power" the log is synced, so that it survives a power cut as well.
    """

    chain = staticmethod(_chain)  # the crash suite has a mutant of it

    def __init__(self, folder: Folder, durability: str) -> None:
        self._folder = folder
        self._power = durability == "power"
        self._records: list[_Record] | None = None  # the records of the file, if they are known

    def append(self, before: Manifest, after: Manifest, parts: Iterable[Part]) -> None:
        """Write the record of a commit, before its manifest: the rows that changed since the last.

        No commit fails because of the log: changes that cannot be written are unknown later.
        """
        records, self._records = self._records, None
        try:
            with self._folder.open(FILE, os.O_RDWR | os.O_CREAT | NO_LINK) as file:
                records = self.chain(_read(file) if records is None else records, commit_of(before))
                ends = [commit_of(before), commit_of(after)]
                start = records[-1].end if records else 0
                self._write(file, encode(parts, before.rows, ends), start)
                records += _read(file, start)
                if len(records) > MOST:
                    self._merge(file, records)
                else:
                    self._records = records
        except OSError:
            pass

    def _write(self, file: File, entries: Iterable[bytes], at: int) -> None:
        for entry in entries:
            at = file.write_at([entry], at)
        if file.size > at:
            file.truncate(at)
        if self._power:
            file.sync()

    def _merge(self, file: File, records: list[_Record]) -> None:
        """Replace the file by one with the older records merged; by an empty one after damage."""
        try:
            merged = (entry for group in _groups(records) for entry in _merged(file, group))
            self._folder.replace(FILE, merged)
        except Damaged:
            self._folder.replace(FILE, [])


def _merged(file: File, group: list[_Record]) -> Iterator[bytes]:
    commits = [group[0].commits[0], *(c for record in group for c in record.commits[1:])]
    return encode(_union(file, group), group[0].rows, commits)


def _groups(records: list[_Record]) -> list[list[_Record]]:
    """Group the records to merge: a group has at most as many commits as there are after it."""
    groups, age, after = list[list[_Record]](), 0, 0
    for record in reversed(records):
        if age >= KEPT:
            break
        age += len(record.commits) - 1
        if groups and after >= EXACT and age - after <= after:
            groups[0].insert(0, record)
        else:
            groups.insert(0, [record])
            after = age - len(record.commits) + 1  # commits that came after the group
    return groups


# --- reading --------------------------------------------------------------------------------------


class ChangedRows:
    """The rows that may differ between an earlier commit and the last.

    Parameters
    ----------
    folder : Folder
        The folder with the log. It must stay open while `rows` and `save` are used.
    state : Manifest
        The last commit.
    generation : int
        The earlier commit.

    Attributes
    ----------
    commit : Commit
        The earlier commit.

    Raises
    ------
    ArgumentError
        If the changes since that commit are unknown.
    """

    chain = staticmethod(_chain)  # the crash suite has a mutant of it

    def __init__(self, folder: Folder, state: Manifest, generation: int) -> None:
        self._folder, self._state = folder, state
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
                f"{folder.path}: which rows changed since generation {generation} is not known; "
                f"allowed: {oldest}..{last[0]}; or export the whole table"
            )

    def _known(self) -> list[_Record]:
        try:
            with self._folder.open(FILE, os.O_RDONLY | NO_LINK) as file:
                return self.chain(_read(file), commit_of(self._state))
        except FileNotFoundError:
            return []

    @property
    def rows_before(self) -> int:
        """Number of rows at the earlier commit, or at one before it; rows beyond it are new."""
        return self._records[0].rows if self._records else self._state.rows

    def rows(self) -> Iterator[I64]:
        """Yield row numbers, ascending, a few million at a time.

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

    def save(self, folder: Folder) -> None:
        """Write these changes as a log of one record into a new folder, durably."""
        ends = [self.commit, commit_of(self._state)]
        folder.replace(FILE, encode(self._parts(), self.rows_before, ends))

    def _parts(self) -> Iterator[Part]:
        if not self._records:
            return
        try:
            with self._folder.open(FILE, os.O_RDONLY | NO_LINK) as file:
                yield from _union(file, self._records)
        except Damaged:
            raise ArgumentError(
                f"{self._folder.path / FILE}: it is damaged, so it is not known which rows "
                "changed; export the whole table"
            ) from None
