"""The journal when the disk is full or fails, and that rows come back after every crash.

Crashes are made at every write: cut short at some byte, or (with "power") any part of what was not
synced lost. Mutants of the protocol show that the checks can fail.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyembed import _core
from pyembed.errors import ArgumentError, TableError
from pyembed.storage import fs, journal
from pyembed.storage.dirty_rows import DirtyRows
from pyembed.storage.fs import Folder
from pyembed.storage.journal import FIELDS, Journal, Replay
from tests.helpers.file_systems import Faults, Unsynced, Watched

SALT, GENERATION, STRIDE, ROWS = 0x0123456789ABCDEF, 4, 3, 1000
Frames = list[tuple[list[int], bytes]]


def old_rows(n: int, stride: int = STRIDE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, stride), np.float32)


def row_numbers(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


# --- the disk is full, the disk fails -----------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB (needs the right to mount)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(undo: Journal) -> int:
    """Record rows until it is refused; returns how many were taken."""
    taken = 0
    with pytest.raises(TableError) as caught:
        for row in range(ROWS):
            undo.record(row_numbers(row), old_rows(1, undo._stride, row))
            taken += 1
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    return taken


def test_full_disk(small_disk: Path) -> None:
    """A full disk is an error that loses nothing; with room again it goes on where it was."""
    stride = 1000
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(300_000))
    undo = Journal(Folder(small_disk), stride)
    undo.begin(GENERATION, SALT)
    taken = fill(undo)
    assert 140 < taken < 190  # of 4 kB each: what there is is used, whatever the growth by steps
    replay = Replay(Folder(small_disk), SALT, GENERATION, stride, ROWS)
    assert [int(rows[0]) for rows, _ in replay] == list(range(taken))
    assert replay.end == "complete"
    ballast.unlink()
    undo.record(row_numbers(taken), old_rows(1, stride, taken))
    for row, (rows, old) in enumerate(replay):
        assert rows.tolist() == [row]
        assert np.array_equal(old, old_rows(1, stride, row))
    assert (replay.end, replay.frames) == ("complete", taken + 2)
    undo.close()


def test_full_disk_at_begin(small_disk: Path) -> None:
    """The first interval on a full disk is refused before anything calls the table dirty."""
    (small_disk / "ballast").write_bytes(bytes((1 << 20) - 4096))
    undo = Journal(Folder(small_disk), STRIDE)
    with pytest.raises(TableError, match="make room"):
        for generation in range(2):
            undo.begin(generation, SALT)
    with pytest.raises(ArgumentError, match="before begin"):
        undo.record(row_numbers(1), old_rows(1))
    undo.close()


def test_limit_of_file_size(tmp_path: Path) -> None:
    """A limit of the system is met like a full disk (and needs no right to mount)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    undo = Journal(Folder(tmp_path), 1000)
    undo.begin(GENERATION, SALT)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        taken = fill(undo)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 40 < taken < 50
    replay = Replay(Folder(tmp_path), SALT, GENERATION, 1000, ROWS)
    assert (len(list(replay)), replay.end) == (taken, "complete")
    undo.close()


def test_a_failed_sync_is_final(tmp_path: Path) -> None:
    """After a failed sync nothing is recorded: the system reports only once what it lost."""
    system = Faults()
    folder = Folder(tmp_path, system)
    undo = Journal(folder, STRIDE, "power")
    undo.begin(GENERATION, SALT)
    undo.record(row_numbers(1), old_rows(1))
    system.fail("sync")
    with pytest.raises(OSError, match="injected"):
        undo.sync()
    system.work()
    for call in (
        undo.sync,
        lambda: undo.record(row_numbers(2), old_rows(1)),
        lambda: undo.begin(GENERATION + 1, SALT),
    ):
        with pytest.raises(TableError, match="a sync of the journal failed"):
            call()
    undo.close()
    undo = Journal(folder, STRIDE, "power")
    system.fail("sync")
    with pytest.raises(OSError, match="injected"):
        undo.begin(GENERATION, SALT)
    system.work()
    with pytest.raises(TableError, match="a sync of the journal failed"):
        undo.begin(GENERATION, SALT)
    undo.close()


class SyncedKinds(Watched):
    """Notes of each sync whether it is that of a file or of a folder."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[str] = []

    def act(self, name: str, make: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if name == "sync":
            folder = stat.S_ISDIR(os.fstat(args[0]).st_mode)
            self.kinds.append("folder" if folder else "file")
        return make()


def test_what_begin_syncs(tmp_path: Path) -> None:
    """ "power": the file's name and frame 0 are durable before the table can be called dirty."""
    for durability, expected in (("process", []), ("power", ["folder", "file"])):
        system = SyncedKinds()
        undo = Journal(Folder(tmp_path, system), STRIDE, durability)
        undo.begin(GENERATION, SALT)
        assert system.kinds == expected
        undo.close()


# --- crashes, and the order of calls -------------------------------------------------------------


class Died(BaseException):
    """The process ends here."""


class Writer:
    """A table in memory that calls the journal as `store` is to call it, or as a mutant does."""

    def __init__(self, folder: Folder, durability: str, mutant: str) -> None:
        self.folder, self.mutant = folder, mutant
        self.power = durability == "power"
        self.rows = old_rows(40)
        self.committed = self.rows.copy()
        self.state, self.generation, self.salt = "clean", 1, 1
        self.salts = iter(range(2, 1000))
        self.undo = Journal(folder, STRIDE, durability)
        self.dirty = DirtyRows(40)

    def step(self, rows: np.ndarray) -> None:
        """Change rows, as an optimizer does."""
        if self.state == "clean":
            salt = next(self.salts)
            if self.mutant == "salt kept":
                salt = self.generation
            if self.mutant == "dirty first":
                self.state, self.salt = "dirty", salt
            self.undo.begin(self.generation, salt)
            self.state, self.salt = "dirty", salt
        new = rows if self.mutant == "every change" else self.dirty.new(rows)
        if self.mutant == "marked first":
            self.dirty.mark(new)
        if self.mutant == "rows first":
            self.rows[rows] += 1
        if new.size:
            self.undo.record(new, self.rows[new])
        if self.power and new.size:
            self.undo.sync()
        if self.mutant != "every change":
            self.dirty.mark(new)
        if self.mutant != "rows first":
            self.rows[rows] += 1

    def commit(self) -> None:
        self.committed = self.rows.copy()
        self.state, self.generation = "clean", self.generation + 1
        if self.mutant != "marks kept":
            self.dirty.commit(40)

    def recover(self) -> bool:
        """Roll back; whether the rows are those of the last commit."""
        if self.state == "dirty":
            replay = Replay(self.folder, self.salt, self.generation, STRIDE, 40)
            for rows, old in replay:
                self.rows[rows] = old
            if replay.end == "damaged":
                return False
        self.state = "clean"
        self.dirty.clear()
        return np.array_equal(self.rows, self.committed)


def train(writer: Writer, forgive: bool) -> bool:
    """Steps, commits and rollbacks; whether the rows came back at each rollback and at the end."""
    rng = np.random.default_rng(0)
    for turn in range(24):
        rows = np.unique(rng.integers(0, 40, 25))
        if turn % 8 == 5:
            writer.commit()
        if turn % 8 in (2, 3) and not writer.recover():
            return False
        try:
            writer.step(rows)
        except TableError:
            if not forgive:
                raise
    return writer.recover()


class CutWrite(Unsynced):
    """Cuts one write short, at some byte; the process then dies, or finds the disk full."""

    def __init__(self, cut: int, after: str) -> None:
        self.writes, self._cut, self._after = 0, cut, after

    def pwrite(self, fd: int, parts: Sequence[memoryview], at: int) -> int:
        """Write all, or a part and fail."""
        self.writes += 1
        if self.writes != self._cut + 1:
            return super().pwrite(fd, parts, at)
        data = b"".join(parts)
        os.pwrite(fd, data[: self._cut * 37 % len(data)], at)
        raise Died if self._after == "die" else OSError(errno.ENOSPC, "injected")


def survives(mutant: str, durability: str, after: str) -> bool:
    """Cut every write of a run short, at some byte; go on, or die, then roll back."""
    writes = 0
    while True:
        system = CutWrite(writes, after)
        with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal, "FRAME_BYTES", 100)
            writer = Writer(Folder(Path(name), system), durability, mutant)
            try:
                sound = train(writer, forgive=True)
            except Died:
                sound = writer.recover()
            writer.undo.close()
        if not sound:
            return False
        if system.writes <= writes:  # the run ended before the write that was to be cut
            return writes > 60
        writes += 1


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("after", ["die", "go on"])
def test_every_write_cut_short(durability: str, after: str) -> None:
    """Whichever write is cut short, and whether the process dies, the commit comes back."""
    assert survives("", durability, after)


@pytest.mark.parametrize(
    "mutant",
    ["rows first", "marked first", "every change", "marks kept", "salt kept", "dirty first"],
)
def test_the_check_of_crashes_can_fail(mutant: str) -> None:
    """Each rule of the order of calls is needed: without it some crash loses the commit."""
    assert not (survives(mutant, "process", "die") and survives(mutant, "process", "go on"))


class Snapshots(fs.FileSystem):
    """Keeps what a file holds at each sync: that much is on the disk."""

    def __init__(self, path: Path) -> None:
        self._path, self.synced = path, b""

    def sync(self, fd: int) -> None:
        """Take the content for durable."""
        self.synced = self._path.read_bytes()


class SettledTooEarly(Snapshots):
    """Each frame calls all frames before it safe, although they were only written."""

    def pwrite(self, fd: int, parts: Sequence[memoryview], at: int) -> int:
        """Write a frame with another header."""
        magic, salt, generation, sequence, _, *rest = FIELDS.unpack_from(parts[0])
        body = FIELDS.pack(magic, salt, generation, sequence, sequence, *rest)
        header = body + _core.crc32c(body).to_bytes(4, "little")
        return super().pwrite(fd, [memoryview(header), *parts[1:]], at)


def survives_power_cuts(
    folder: Path, file_system: type[Snapshots] = Snapshots, rounds: int = 40
) -> bool:
    """Lose any part of what was not synced, and what shares a block with it, after each write."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    system = file_system(folder / journal.file_name(GENERATION))
    undo = Journal(Folder(folder, system), STRIDE, "power")
    safe: Frames = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "FRAME_BYTES", 100)
        undo.begin(GENERATION, SALT)
        for turn in range(rounds):
            written = list(safe)
            for first in range(turn * 16, turn * 16 + 16, 4):
                piece, old = np.arange(first, first + 4), old_rows(4, seed=turn)
                undo.record(piece, old)
                written.append((piece.tolist(), old.tobytes()))
            for _ in range(4):
                if not power_cut(folder, system.synced, safe, written, rng):
                    return False
            undo.sync()
            safe = written
    undo.close()
    return True


def power_cut(
    folder: Path, synced: bytes, safe: Frames, written: Frames, rng: np.random.Generator
) -> bool:
    """Whether a journal that is partly on the disk gives all that is safe, and nothing wrong."""
    name = journal.file_name(GENERATION)
    now = (folder / name).read_bytes()
    disk = bytearray(synced.ljust(len(now), b"\0"))
    for at in range(0, len(now), 4096):
        block = slice(at, at + 4096)
        if now[block] != disk[block]:
            fate = rng.integers(3)
            if fate == 1:
                disk[block] = now[block]
            elif fate == 2:  # torn: no bytes of the block are sure
                disk[block] = rng.bytes(len(now[block]))
    image = folder / "image"
    image.mkdir(exist_ok=True)
    (image / name).write_bytes(disk)
    replay = Replay(Folder(image), SALT, GENERATION, STRIDE, ROWS)
    found = [(rows.tolist(), old.tobytes()) for rows, old in replay]
    return len(safe) <= len(found) and found == written[: len(found)] and replay.end != "damaged"


def test_every_power_cut(tmp_path: Path) -> None:
    """Whatever part of an unsynced step reaches the disk: synced frames are whole, none is wrong,
    and a step that was under way is not taken for damage."""
    assert survives_power_cuts(tmp_path / "j")


def test_the_check_of_power_cuts_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants: synced and new frames share a block; frames call safe what was only written."""
    with monkeypatch.context() as patch:
        patch.setattr(journal, "BLOCK", 64)
        assert not survives_power_cuts(tmp_path / "blocks")
    assert not survives_power_cuts(tmp_path / "settled", SettledTooEarly)
