"""The bytes of the rollback journal, damage to them, and the marks of dirty rows."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyembed import _core
from pyembed.errors import ArgumentError, FormatError
from pyembed.storage import fs, journal
from pyembed.storage.dirty_rows import DirtyRows
from pyembed.storage.fs import Folder
from pyembed.storage.journal import FIELDS, UNIT, Journal, Replay

SALT, GENERATION, STRIDE, ROWS = 0x0123456789ABCDEF, 4, 3, 1000
Frames = list[tuple[list[int], bytes]]


def old_rows(n: int, stride: int = STRIDE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, stride), np.float32)


def row_numbers(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def journal_path(folder: Path, generation: int = GENERATION) -> Path:
    """The file with the frames after a generation."""
    return folder / journal.file_name(generation)


def write(folder: Path, counts: list[int], durability: str = "process") -> tuple[Frames, list[int]]:
    """A journal with a frame of rows for each count: what is in it, and where each frame begins."""
    undo = Journal(Folder(folder), STRIDE, durability)
    undo.begin(GENERATION, SALT)
    frames: Frames = []
    starts = [0, undo._at]
    first = 0
    for n in counts:
        rows, old = np.arange(first, first + n), old_rows(n, seed=first)
        undo.record(rows, old)
        frames.append((rows.tolist(), old.tobytes()))
        starts.append(undo._at)
        first += n
    undo.close()
    return frames, starts


def read(path: Path, salt: int = SALT, generation: int = GENERATION) -> tuple[Frames, Replay]:
    replay = Replay(Folder(path.parent), salt, generation, STRIDE, ROWS)
    return [(rows.tolist(), old.tobytes()) for rows, old in replay], replay


# --- the bytes ---------------------------------------------------------------------------------


def test_layout(tmp_path: Path) -> None:
    """A frame is what the picture says, byte for byte; another program can be written from it."""
    write(tmp_path, [2])
    data = journal_path(tmp_path, GENERATION).read_bytes()
    assert journal_path(tmp_path, GENERATION).name == "undo0"
    payload = [np.arange(2, dtype="<i8").tobytes(), old_rows(2).astype("<f4").tobytes()]
    sums = [_core.crc32c(part) for part in payload]
    body = struct.pack("<8s4Q5I", b"PYUNDO1\n", SALT, GENERATION, 1, 1, 128, 2, STRIDE, *sums)
    header = body + struct.pack("<I", _core.crc32c(body))
    assert data[64:128] == header
    assert data[128 : 128 + 40] == b"".join(payload)
    assert data[168:] == bytes(len(data) - 168)


@given(
    counts=st.lists(st.integers(0, 40), max_size=6),
    stride=st.sampled_from([1, 3, 16, 193]),
    durability=st.sampled_from(["process", "power"]),
    frame_bytes=st.sampled_from([1, 100, 1000, 1 << 20]),
)
def test_round_trip(counts: list[int], stride: int, durability: str, frame_bytes: int) -> None:
    """Rows come back in order and bit for bit, in frames of bounded size, as often as one reads."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "FRAME_BYTES", frame_bytes)
        undo = Journal(Folder(Path(folder)), stride, durability)
        undo.begin(7, SALT)
        rows = np.cumsum(np.arange(1, sum(counts) + 1))
        old = old_rows(rows.size, stride)
        at = 0
        for n in counts:
            undo.record(rows[at : at + n], old[at : at + n])
            at += n
        replay = Replay(Folder(Path(folder)), SALT, 7, stride, 1 << 20)
        for _ in range(2):
            frames = list(replay)
            assert (replay.end, replay.problem, replay.frames) == ("complete", "", undo.frames)
            assert all(r.size == 1 or r.size * (8 + 4 * stride) <= frame_bytes for r, _ in frames)
            back = [np.zeros(0, np.int64), *(r for r, _ in frames)]
            assert np.concatenate(back).tolist() == rows.tolist()
            assert b"".join(o.tobytes() for _, o in frames) == old.tobytes()
        undo.close()


def test_special_floats(tmp_path: Path) -> None:
    """NaN, infinity and -0 come back with their bits."""
    old = np.array([[np.nan, np.inf, -0.0]], np.float32)
    old.view(np.uint32)[0, 0] = 0x7F800001  # a signalling NaN
    undo = Journal(Folder(tmp_path), STRIDE)
    undo.begin(GENERATION, SALT)
    undo.record(row_numbers(5), old)
    assert read(tmp_path / undo.name)[0] == [([5], old.tobytes())]
    undo.close()


def test_rows_fit_a_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are cut into frames of bounded size; a row wider than that has one of its own."""
    monkeypatch.setattr(journal, "FRAME_BYTES", 100)
    for stride, sizes in ((STRIDE, [5, 5, 2]), (1000, [1] * 12)):
        undo = Journal(Folder(tmp_path), stride)
        undo.begin(GENERATION, SALT)
        undo.record(np.arange(12), old_rows(12, stride))
        replay = Replay(Folder(tmp_path), SALT, GENERATION, stride, ROWS)
        assert [rows.size for rows, _ in replay] == sizes
        undo.close()


class ShortWrites(fs.FileSystem):
    """Takes 13 bytes at a time."""

    def pwrite(self, fd: int, parts: Sequence[memoryview], at: int) -> int:
        """Write a few bytes."""
        return os.pwrite(fd, b"".join(parts)[:13], at)


def test_short_writes(tmp_path: Path) -> None:
    """A system that takes a few bytes at a time gets all of them, each in its place."""
    with fs.using(ShortWrites()):
        frames, _ = write(tmp_path, [2, 1])
    found, replay = read(journal_path(tmp_path, GENERATION))
    assert (found, replay.end) == (frames, "complete")


def test_odd_arrays_are_refused(tmp_path: Path) -> None:
    """Arrays that would be read back as something else are refused before a byte is written."""
    undo = Journal(Folder(tmp_path), STRIDE)
    with pytest.raises(ArgumentError, match="record before begin"):
        undo.record(row_numbers(1), old_rows(1))
    undo.begin(GENERATION, SALT)
    before = undo.bytes_written
    pairs: list[tuple[Any, Any]] = [
        (row_numbers(1).astype(np.int32), old_rows(1)),
        (row_numbers(1), old_rows(1).astype(np.float64)),
        (row_numbers(1), old_rows(1, STRIDE + 1)),
        (row_numbers(1, 2), old_rows(1)),
    ]
    for rows, old in pairs:
        with pytest.raises(ArgumentError, match="expected int64"):
            undo.record(rows, old)
    assert undo.bytes_written == before
    undo.close()


def test_files_are_used_again(tmp_path: Path) -> None:
    """Intervals take turns with two files, which keep their size and their place on the disk; the
    end of a short one is not confused by what a longer one left behind it."""
    undo = Journal(Folder(tmp_path), STRIDE)
    places = set()
    for generation in range(6):
        undo.begin(generation, SALT)
        written = []
        for row in range(20 - 3 * generation):
            undo.record(row_numbers(row), old_rows(1, seed=generation))
            written.append(([row], old_rows(1, seed=generation).tobytes()))
        found, replay = read(tmp_path / undo.name, SALT, generation)
        assert (found, replay.end) == (written, "complete")
        status = (tmp_path / undo.name).stat()
        places.add(((tmp_path / undo.name).name, status.st_ino, status.st_size))
    names, _, sizes = zip(*sorted(places), strict=True)
    assert names == ("undo0", "undo1")
    assert set(sizes) == {64 << 10}  # allocated ahead
    assert undo.bytes_written == 6 * (64 + 64) + 75 * (64 + 20 + 44 + 64)  # zeros included
    undo.close()
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["undo0", "undo1"]


# --- damage ------------------------------------------------------------------------------------


def corruption_is_noticed(folder: Path, uncompared: str = "") -> bool:
    """Whether each flipped byte costs at most the frames from there on, and the end says so.

    `uncompared` names a part of each frame whose checksum is made right after the flip, as if a
    reader did not compare it: "rows", "old" or "header".
    """
    frames, starts = write(folder, [2, 1, 4])
    path = journal_path(folder, GENERATION)
    end = starts[-1] + 64
    os.truncate(path, end)
    whole = path.read_bytes()
    used = [64, *(64 + 20 * n for n in (2, 1, 4))]  # without the zeros up to the next frame
    for at in range(end):
        hit = sum(at >= start for start in starts) - 1
        padding = hit < 4 and at - starts[hit] >= used[hit]
        for flip in (0x01, 0x80, 0xFF):
            data = bytearray(whole)
            data[at] ^= flip
            for start in starts[:-1] if uncompared else ():
                make_sum_right(data, start, uncompared)
            path.write_bytes(data)
            found, replay = read(path)
            if found != (frames if padding else frames[: max(0, hit - 1)]):
                return False
            if replay.end != ("complete" if padding else "torn" if hit >= 3 else "damaged"):
                return False
    return True


def make_sum_right(data: bytearray, at: int, part: str) -> None:
    """Give the frame at an offset a right checksum of one of its parts."""
    body = slice(at, at + FIELDS.size)
    *same, n, stride, rows_crc, old_crc = FIELDS.unpack(data[body])
    is_sound = _core.crc32c(data[body]).to_bytes(4, "little") == data[body.stop : at + UNIT]
    if not is_sound and part != "header":
        return
    rows = at + UNIT + 8 * n
    if part == "rows":
        rows_crc = _core.crc32c(data[at + UNIT : rows])
    if part == "old":
        old_crc = _core.crc32c(data[rows : rows + 4 * n * stride])
    data[body] = FIELDS.pack(*same, n, stride, rows_crc, old_crc)
    data[body.stop : at + UNIT] = _core.crc32c(data[body]).to_bytes(4, "little")


def test_every_corrupt_byte_is_noticed(tmp_path: Path) -> None:
    """No flipped byte gives wrong rows; what is lost with it is said: damage, if frames follow."""
    assert corruption_is_noticed(tmp_path)


@pytest.mark.parametrize("part", ["rows", "old", "header"])
def test_each_checksum_of_a_frame_is_needed(tmp_path: Path, part: str) -> None:
    """A flipped byte goes unnoticed if the checksum of its part is not compared."""
    assert not corruption_is_noticed(tmp_path, part)


def test_cut_at_every_byte(tmp_path: Path) -> None:
    """However short the file is, the whole frames in it come back, and the end is not complete."""
    frames, starts = write(tmp_path, [2, 1, 4])
    path = journal_path(tmp_path, GENERATION)
    for size in reversed(range(starts[-1] + 64)):
        os.truncate(path, size)
        found, replay = read(path)
        used = sum(
            size >= start + 64 + 20 * n for start, n in zip(starts[1:4], (2, 1, 4), strict=True)
        )
        assert found == frames[:used]
        assert replay.end == ("damaged" if size < 64 else "torn")
        assert str(path) in replay.problem


@pytest.mark.parametrize("frame", range(4))
@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_lost_frame(
    tmp_path: Path, frame: int, durability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame that reads as zeros is damage if a later one was begun when it was safe."""
    monkeypatch.setattr(journal, "SCAN_BYTES", 128)
    undo = Journal(Folder(tmp_path), STRIDE, durability)
    undo.begin(GENERATION, SALT)
    starts = [0]
    for at in range(3):
        starts.append(undo._at)
        undo.record(row_numbers(at), old_rows(1))
        if durability == "power":
            undo.sync()
    data = bytearray((tmp_path / undo.name).read_bytes())
    data[starts[frame] : [*starts, undo._at][frame + 1]] = bytes(undo._at - starts[-1])
    (tmp_path / undo.name).write_bytes(data)
    found, replay = read(tmp_path / undo.name)
    assert len(found) == max(0, frame - 1)
    assert replay.end == ("complete" if frame == 3 else "damaged")
    undo.close()


def test_frames_in_another_order(tmp_path: Path) -> None:
    """Whole frames that are not in their place are damage."""
    _, starts = write(tmp_path, [1, 1, 1])
    path = journal_path(tmp_path, GENERATION)
    data = path.read_bytes()
    first, second, third = starts[1:4]
    path.write_bytes(data[:first] + data[second:third] + data[first:second] + data[third:])
    found, replay = read(path)
    assert (found, replay.end) == ([], "damaged")


def test_no_journal_where_one_must_be(tmp_path: Path) -> None:
    """A journal that is missing, empty or of another table is damage, not an empty one."""
    path = journal_path(tmp_path, GENERATION)
    found, replay = read(path)
    assert (found, replay.end) == ([], "damaged")
    assert "missing" in replay.problem
    for data in (b"", bytes(10_000)):
        path.write_bytes(data)
        assert read(path)[1].end == "damaged"
    write(tmp_path, [3])
    for args in ((SALT + 1, GENERATION), (SALT, GENERATION + 2)):
        found, replay = read(path, *args)
        assert (found, replay.end) == ([], "damaged")
        assert "does not begin" in replay.problem


@pytest.mark.parametrize("size", [0, 64, 100, 131])
def test_right_sums_of_odd_sizes(tmp_path: Path, size: int) -> None:
    """A header whose sums are right and whose size is less than its rows, or odd, is damage."""
    undo = Journal(Folder(tmp_path), STRIDE)
    undo.begin(GENERATION, SALT)
    header = journal._Header(SALT, GENERATION, 1, 1, size, 1, STRIDE, _core.crc32c(bytes(8)), 0)
    (tmp_path / undo.name).write_bytes(
        (tmp_path / undo.name).read_bytes()[:64] + journal._pack(header) + bytes(200)
    )
    found, replay = read(tmp_path / undo.name)
    assert (found, replay.end) == ([], "damaged")
    undo.close()


def test_right_sums_of_another_table(tmp_path: Path) -> None:
    """Frames that are whole, but of another width or of rows that do not exist, are damage."""
    write(tmp_path, [3])
    for stride, rows, message in ((STRIDE + 1, ROWS, "another table"), (STRIDE, 2, "0..1")):
        replay = Replay(Folder(tmp_path), SALT, GENERATION, stride, rows)
        assert list(replay) == []
        assert replay.end == "damaged"
        assert message in replay.problem
    undo = Journal(Folder(tmp_path), STRIDE)
    undo.begin(GENERATION, SALT)
    undo.record(row_numbers(-1), old_rows(1))
    assert (read(tmp_path / undo.name)[0], read(tmp_path / undo.name)[1].end) == ([], "damaged")
    undo.close()


@given(data=st.binary(max_size=400), at=st.integers(0, 400))
def test_junk(data: bytes, at: int) -> None:
    """No bytes whatsoever, put anywhere into a journal, make the reader fail or invent rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        frames, _ = write(folder, [2, 1, 4])
        path = journal_path(folder, GENERATION)
        before = path.read_bytes()[:448]
        path.write_bytes(before[:at] + data + before[at + len(data) :])
        found, replay = read(path)
        assert found == frames[: len(found)]
        assert replay.end in ("complete", "torn", "damaged")


def test_only_regular_files(tmp_path: Path) -> None:
    """A link or a pipe under the journal's name is not followed."""
    target = tmp_path / "precious"
    target.write_bytes(b"x" * 1000)
    journal_path(tmp_path, 0).symlink_to(target)
    os.mkfifo(journal_path(tmp_path, 1))
    undo = Journal(Folder(tmp_path), STRIDE)
    with pytest.raises(OSError, match="symbolic"):
        undo.begin(0, SALT)
    with pytest.raises(FormatError, match="not a regular file"):
        undo.begin(1, SALT)
    with pytest.raises(ArgumentError, match="before begin"):
        undo.record(row_numbers(1), old_rows(1))
    assert target.read_bytes() == b"x" * 1000


# --- dirty rows -----------------------------------------------------------------------------------

BATCH = st.lists(st.integers(0, 100_000), max_size=30).map(lambda ids: np.unique(ids).astype("i8"))


def marks(dirty: DirtyRows) -> list[int]:
    """The rows that the parts say."""
    rows: list[int] = []
    for number, offsets, values in dirty.parts():
        assert np.all(np.diff(offsets.astype(int)) > 0)
        bits = np.unpackbits(values, bitorder="little").reshape(-1, 8)
        rows += [(number << 24) + 8 * int(offsets[i]) + int(bit) for i, bit in np.argwhere(bits)]
    return rows


@given(turns=st.lists(st.tuples(BATCH, st.sampled_from(["", "commit", "clear"])), max_size=12))
def test_dirty_rows_are_a_set(turns: list[tuple[np.ndarray, str]]) -> None:
    """Marks are a set of rows that a commit and a rollback empty; rows that are new have none."""
    dirty, rows, changed = DirtyRows(70_000), 70_000, set[int]()
    for batch, what in turns:
        new = dirty.new(batch)
        assert new.tolist() == [r for r in batch.tolist() if r < rows and r not in changed]
        assert dirty.new(batch).tolist() == new.tolist()  # asking does not mark
        dirty.mark(new)
        changed |= set(new.tolist())
        assert dirty.new(batch).tolist() == []
        assert marks(dirty) == sorted(changed)
        if what:
            rows += 10_000 if what == "commit" else 0
            changed = set()
            dirty.commit(rows) if what == "commit" else dirty.clear()
            assert marks(dirty) == []


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 32768, 32769, 1 << 32])
def test_dirty_rows_at_the_edges(rows: int) -> None:
    """The last row is one like the others; a table without rows has none; 2^32 rows are quick."""
    dirty = DirtyRows(rows)
    last = row_numbers(rows - 1, rows) if rows else row_numbers(0)
    assert dirty.new(last).tolist() == [rows - 1] * (rows > 0)
    dirty.mark(dirty.new(last))
    assert dirty.new(last).size == 0
    assert marks(dirty) == [rows - 1] * (rows > 0)
    dirty.commit(rows)
    assert not dirty._dirty.any()  # so the next one has as little to clear
    assert dirty.new(last).tolist() == [rows - 1] * (rows > 0)
