"""Tables on disk: what is written, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyembed
from pyembed import Table
from pyembed.errors import (
    ArgumentError,
    DirtyError,
    FormatError,
    LockedError,
    ReadOnlyError,
    TableError,
)
from pyembed.storage import create, manifest
from pyembed.storage.manifest import Manifest
from tests.helpers import child
from tests.helpers.child import kill_writer

ONES = np.ones((1, 2), np.float32)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def rewrite(folder: Path, **changes: object) -> None:
    """Write a manifest with a right checksum and other content."""
    file = folder / "manifest.json"
    body = json.loads(file.read_bytes())
    del body["crc32c"]
    body |= changes
    body["crc32c"] = manifest._checksum(body)
    file.write_text(json.dumps(body))


def test_layout_for_other_tools(table: Path) -> None:
    """numpy opens the rows without pyembed; they start on a page; the folder holds four files."""
    rows = np.load(table / "rows.npy", mmap_mode="r")
    assert rows.dtype == "<f4"
    assert rows.shape == (4, 4)
    assert rows.offset == 4096
    assert rows[:, :2].ravel().tolist() == list(range(8))
    assert sorted(contents(table)) == ["changes", "lock", "manifest.json", "rows.npy"]


def test_manifest_is_readable_text(table: Path) -> None:
    """A person, and any JSON reader, sees what the table is."""
    body = json.loads((table / "manifest.json").read_text())
    assert body["format"] == "pyembed-table"
    assert body["columns"] == {"weight": 2, "sum": 2}
    assert (body["rows"], body["state"], body["durability"]) == (4, "clean", "process")


def test_commit_and_reopen(table: Path) -> None:
    """Rows, state and meta come back; the generation counts commits."""
    with Table.open(table) as t:
        before = t.generation
        pyembed.optim.Adagrad(t, lr=1.0).step([1], ONES)
        t.commit(meta={"step": 1, "note": "é"})
        assert (t.generation, t.state) == (before + 1, "clean")
    with Table.open(table, "r") as t:
        assert t.meta == {"step": 1, "note": "é"}
        assert t.gather(1).tolist() == [1, 2]
        assert t.column("sum")[1].tolist() == [1, 1]


def test_close_commits(table: Path) -> None:
    """The clean end of a with block is a commit."""
    with Table.open(table) as t:
        t.scatter_add([0], ONES)
        assert json.loads((table / "manifest.json").read_bytes())["state"] == "dirty"
    with Table.open(table, "r") as t:
        assert t.gather(0).tolist() == [1, 2]


def test_exception_leaves_the_last_commit(table: Path) -> None:
    """Rows changed in a block that failed are taken back."""
    before = contents(table)
    with pytest.raises(ZeroDivisionError), Table.open(table) as t:
        t.scatter_add([0], ONES)
        raise ZeroDivisionError
    assert contents(table) == before


def test_exception_without_a_journal_leaves_it_dirty(table: Path) -> None:
    """With durability "none" such rows are not passed off as committed."""
    with pytest.raises(ZeroDivisionError), Table.open(table, durability="none") as t:
        t.scatter_add([0], ONES)
        raise ZeroDivisionError
    with pytest.raises(DirtyError, match="without a commit after generation 1.*salvage=True"):
        Table.open(table)
    with Table.open(table, salvage=True) as t:
        assert t.gather(0).tolist() == [1, 2]
        assert (t.state, t.generation) == ("clean", 2)
    Table.open(table).close()


def test_exception_without_changes_stays_clean(table: Path) -> None:
    """A block that failed before it changed a row leaves the table as it was."""
    before = contents(table)
    with pytest.raises(IndexError), Table.open(table) as t:
        t.scatter_add([7], ONES)
    assert contents(table) == before


def add_ones(t: Table) -> None:
    """Change the first row."""
    t.scatter_add([0], ONES)


@pytest.mark.parametrize("durability", ["process", "power", "none"])
def test_killed_writer(table: Path, durability: str) -> None:
    """After a kill the next writer finds the last commit, a reader too; without a journal it is
    known that there were changes."""
    before = contents(table)
    kill_writer(table, add_ones, durability=durability)
    if durability == "none":
        with pytest.raises(DirtyError):
            Table.open(table, "r")
        return
    dirty = contents(table)
    assert dirty["rows.npy"] != before["rows.npy"]
    for mode in ("r", "c"):
        with Table.open(table, mode) as t:
            assert t.gather(0).tolist() == [0, 1]
            assert t.writable == (mode == "c")
    assert contents(table) == dirty
    with Table.open(table) as t:
        assert (t.gather(0).tolist(), t.state, t.generation) == ([0, 1], "clean", 1)
    assert contents(table)["rows.npy"] == before["rows.npy"]


def test_restart_of_the_machine(table: Path) -> None:
    """With "process", a table with changes from before a restart of the machine is refused."""
    with contextlib.suppress(ZeroDivisionError), Table.open(table) as t:
        t.scatter_add([0], ONES)
        shutil.copytree(table, table.with_name("after"))
        raise ZeroDivisionError
    rewrite(table.with_name("after"), boot="of yesterday")
    with pytest.raises(DirtyError, match="the machine went down.*salvage=True"):
        Table.open(table.with_name("after"))


def test_rollback(table: Path) -> None:
    """Rows, state columns, appended rows and meta go back to the commit, as often as one likes."""
    with Table.open(table) as t:
        o = pyembed.optim.Adagrad(t, lr=1.0)
        t.rollback()
        o.step([1], ONES)
        t.commit({"step": 1})
        kept = {name: t.column(name).copy() for name in t.columns}
        for _ in range(3):
            o.step([0, 1, 3], np.ones((3, 2), np.float32))
            t.append(5)
            with t.writing() as weight:
                weight[:] = 9
            t.rollback()
            assert (t.rows, t.meta, t.state) == (4, {"step": 1}, "clean")
            assert all(np.array_equal(t.column(name), kept[name]) for name in kept)
    with Table.open(table, "r") as t:
        assert (t.rows, t.generation) == (4, 2)


def test_rollback_needs_a_journal(table: Path) -> None:
    """Where nothing was kept, a rollback is refused."""
    with Table.open(table, durability="none") as t, pytest.raises(ArgumentError, match="journal"):
        t.rollback()
    with pytest.raises(ArgumentError, match="memory keeps no journal"):
        Table.memory(1, 1).rollback()
    with Table.open(table, "r") as t, pytest.raises(ReadOnlyError):
        t.rollback()
    with pytest.raises(ArgumentError, match="allowed: process, power, none"):
        Table.open(table, durability="always")


def test_forgotten_table_is_committed_with_a_warning(table: Path) -> None:
    """A writer that is dropped without close() loses nothing, and hears about it."""
    t = Table.open(table)
    t.scatter_add([0], ONES)
    with pytest.warns(ResourceWarning, match="was not closed"):
        del t
        gc.collect()
    with Table.open(table, "r") as t:
        assert t.gather(0).tolist() == [1, 2]


kept: list[Table] = []  # alive until the interpreter ends


def change_and_forget(path: Path) -> None:
    """Leave a changed table open."""
    kept.append(Table.open(path))
    add_ones(kept[0])


def test_forgotten_at_exit(table: Path) -> None:
    """A writer that is still open when the interpreter ends is committed."""
    child.run(change_and_forget, table, flags=("-W", "ignore"))
    with Table.open(table, "r") as t:
        assert t.gather(0).tolist() == [1, 2]


def test_one_writer_many_readers(table: Path) -> None:
    """A writer excludes all others, readers exclude a writer, live=True reads during a writer."""
    with Table.open(table) as writer:
        for mode in ("r+", "r", "c"):
            with pytest.raises(LockedError):
                Table.open(table, mode)
        with Table.open(table, "r", live=True) as reader:
            writer.scatter_add([0], ONES)
            assert reader.gather(0).tolist() == [1, 2]
    with Table.open(table, "r"), Table.open(table, "r"), pytest.raises(LockedError):
        Table.open(table)
    with pytest.raises(ArgumentError, match="live=True needs mode='r'"):
        Table.open(table, live=True)


def test_a_second_process_is_refused(table: Path) -> None:
    """The lock holds across processes and goes with the process that held it."""
    with Table.open(table):
        assert "LockedError" in child.run(Table.open, table, status=1).stderr
    child.run(Table.open, table)


@pytest.mark.parametrize("bare", [False, True])
def test_read_only(table: Path, bare: bool) -> None:
    """A table open for reading refuses every write and keeps its bytes."""
    source = table / "rows.npy" if bare else table
    before = contents(table)
    with Table.open(source, "r") as t:
        for call in (
            lambda: t.scatter_add([0], np.ones((1, t.dim), np.float32)),
            lambda: t.writing([0]).__enter__(),
            lambda: t.append(1),
            lambda: t.commit(),
            lambda: pyembed.optim.SGD(t).step([0], np.ones((1, t.dim), np.float32)),
        ):
            with pytest.raises(ReadOnlyError):
                call()
    assert contents(table) == before


def test_copy_on_write(table: Path) -> None:
    """Mode "c" takes writes that never reach the file."""
    before = contents(table)
    with Table.open(table, "c") as t:
        t.scatter_add([0], ONES)
        assert t.gather(0).tolist() == [1, 2]
    assert contents(table) == before


def test_bare_npy(tmp_path: Path) -> None:
    """A file of np.save is a table with one column, and writes reach it."""
    file = tmp_path / "plain.npy"
    np.save(file, np.zeros((3, 5), np.float32))
    with Table.open(file) as t:
        assert t.columns == {"weight": 5}
        t.scatter_add([2], np.ones((1, 5), np.float32))
    assert np.load(file).sum() == 5


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 5)),
        np.zeros(3, np.float32),
        np.zeros((3, 5), ">f4"),
        np.asfortranarray(np.zeros((3, 5), np.float32)),
        np.zeros((3, 5), "i4"),
    ],
)
def test_npy_of_another_kind(tmp_path: Path, array: np.ndarray) -> None:
    """An .npy that is not 2-D float32 in C order is refused with the way to convert it."""
    file = tmp_path / "other.npy"
    np.save(file, array)
    with pytest.raises(FormatError, match=r"allowed: 2-D float32 in C order"):
        Table.open(file)


@pytest.mark.parametrize("size", [0, 1, 9, 10, 100, 127, 128, 187])
def test_truncated_npy(tmp_path: Path, size: int) -> None:
    """An .npy that is cut anywhere is refused; numpy's own mapping would extend it with zeros."""
    file = tmp_path / "cut.npy"
    np.save(file, np.zeros((3, 5), np.float32))
    with file.open("r+b") as f:
        f.truncate(size)
    with pytest.raises(FormatError):
        Table.open(file)
    assert file.stat().st_size == size


@pytest.mark.parametrize("change", [-4096, -64, -1, 1, 64, 4096])
def test_wrong_size(table: Path, change: int) -> None:
    """A file shorter or longer than its manifest is refused before it is mapped."""
    rows = table / "rows.npy"
    os.truncate(rows, rows.stat().st_size + change)
    before = contents(table)
    with pytest.raises(FormatError, match="cut short|not an .npy"):
        Table.open(table)
    assert contents(table) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2; this pyembed reads version 1"),
        ({"version": "1"}, "version '1'"),
        ({"format": "other"}, "not a pyembed table"),
        ({"rows": 5}, "manifest asks for"),
        ({"rows": -1}, "out of range"),
        ({"rows": 2**62}, "out of range"),
        ({"rows": 4.0}, "rows is not of type int"),
        ({"rows": True}, "rows is not of type int"),
        ({"columns": {"weight": 4}}, None),
        ({"columns": {"sum": 2, "weight": 2}}, "first must be 'weight'"),
        ({"columns": {"weight": 2, "sum": 0}}, "width 0"),
        ({"columns": {"weight": 2, "../x": 2}}, "column name"),
        ({"columns": []}, "columns is not of type dict"),
        ({"state": "fine"}, "state 'fine'"),
        ({"durability": "always"}, "durability = 'always'"),
        ({"salt": "xyz"}, "salt 'xyz'"),
        ({"boot": 5}, "boot 5"),
        ({"seal": "12"}, "seal '12'"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_odd_manifests(table: Path, changes: dict[str, object], message: str | None) -> None:
    """A manifest with a right checksum and odd content is refused; only another cut of columns
    that has the same width is a different, valid table."""
    rewrite(table, **changes)
    if message is None:
        Table.open(table).close()
        return
    with pytest.raises(FormatError, match=message):
        Table.open(table)


def test_every_flipped_bit_of_the_manifest_is_noticed(table: Path) -> None:
    """Whichever bit of the manifest's text flips, the table is refused or says the same."""
    file = table / "manifest.json"
    text = file.read_bytes()
    good = manifest.decode(text, "")
    for position in range(len(text)):
        for bit in range(8):
            damaged = bytearray(text)
            damaged[position] ^= 1 << bit
            with contextlib.suppress(FormatError):
                assert manifest.decode(bytes(damaged), "m") == good  # white space


@given(data=st.binary(max_size=200))
def test_manifest_of_junk(data: bytes) -> None:
    """No bytes whatsoever make the reader fail with anything but FormatError."""
    with pytest.raises(FormatError):
        manifest.decode(data, "junk")


@given(
    meta=st.dictionaries(
        st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text(max_size=5)
    )
)
def test_manifest_round_trip(meta: dict[str, object]) -> None:
    """Decoding an encoded manifest gives the same manifest."""
    state = Manifest(3, {"weight": 2, "b": 1}, generation=4, state="dirty", meta=meta)
    assert manifest.decode(manifest.encode(state), "") == state


@pytest.mark.parametrize(
    "meta", [{"x": object()}, {"x": float("nan")}, {1: 2}, {"x": (1, 2)}, {"x": "y" * 2**20}]
)
def test_meta_that_cannot_be_stored(table: Path, meta: Any) -> None:
    """Meta that would not come back as it is is refused, and nothing is committed."""
    with Table.open(table) as t:
        t.scatter_add([0], ONES)
        generation = t.generation
        with pytest.raises(ArgumentError, match="meta"):
            t.commit(meta)
        assert (t.generation, t.state) == (generation, "dirty")


def test_existing_target(table: Path) -> None:
    """create never touches what is there."""
    before = contents(table)
    with pytest.raises(FileExistsError, match="choose a new name"):
        Table.create(table, 2, 2)
    assert contents(table) == before


def test_missing(tmp_path: Path) -> None:
    """A table that is not there is a FileNotFoundError that names it."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Table.open(tmp_path / "nowhere")


def test_interrupted_creation_leaves_nothing(path: Path) -> None:
    """A creation that is stopped in any way leaves no incomplete table."""

    def chunks() -> Iterator[np.ndarray]:
        yield np.zeros((5, 2), np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create.create(path, {"weight": 2}, chunks(), 10)
    assert list(path.parent.iterdir()) == []


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


def test_full_disk_at_creation(small_disk: Path) -> None:
    """A table that does not fit is a clear error at creation, and nothing is left."""
    with pytest.raises(TableError, match=r"needs 4,004,096 more bytes.*make room") as caught:
        Table.create(small_disk / "t", 10_000, 100)
    assert caught.value.errno == errno.ENOSPC
    assert list(small_disk.iterdir()) == []


def test_full_disk_at_append(small_disk: Path) -> None:
    """An append that does not fit leaves the table as it was."""
    with Table.create(small_disk / "t", 1000, 100, init=pyembed.init.normal()) as t:
        before = contents(small_disk / "t")
        with pytest.raises(TableError, match="make room"):
            t.append(10_000)
        t.rollback()
        assert {
            k: v for k, v in contents(small_disk / "t").items() if not k.startswith("undo")
        } == before
        assert t.rows == 1000


def test_full_disk_at_a_step(small_disk: Path) -> None:
    """A journal that finds no room is an error before a row changes; the table goes on after it."""
    with Table.create(small_disk / "t", 1000, 100, init=pyembed.init.normal()) as t:
        before = t.weight.copy()
        filler = small_disk / "filler"
        filler.write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - 50_000)))
        with pytest.raises(TableError, match="make room"):
            t.scatter_add(np.arange(1000), np.ones((1000, 100), np.float32))
        assert np.array_equal(t.weight, before)
        filler.unlink()
        t.scatter_add(np.arange(1000), np.ones((1000, 100), np.float32))
    with Table.open(small_disk / "t", "r") as t:
        assert np.array_equal(t.weight, before + 1)


def test_full_disk_while_streaming(small_disk: Path) -> None:
    """Rows whose number is not known beforehand meet a full disk with the same kind of error."""
    chunks = (np.zeros((100, 100), np.float32) for _ in range(100))
    with pytest.raises(TableError, match="make room"):
        create.create(small_disk / "t", {"weight": 100}, chunks, None)
    assert list(small_disk.iterdir()) == []


def test_a_table_can_be_copied(table: Path, tmp_path: Path) -> None:
    """A folder copied with ordinary tools is a table."""
    shutil.copytree(table, tmp_path / "copy")
    with Table.open(table), Table.open(tmp_path / "copy") as t:
        assert t.gather(3).tolist() == [6, 7]


@pytest.mark.parametrize("shape", ["(-1, 5)", "(-2, -5)", "(3, 0)"])
def test_npy_of_an_odd_shape(tmp_path: Path, shape: str) -> None:
    """Shapes that no array has are refused before anything is mapped, and the lock is let go."""
    file = tmp_path / "odd.npy"
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    file.write_bytes(b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(117) + b"\n" + bytes(400))
    for _ in range(2):
        with pytest.raises(FormatError, match="allowed: rows of"):
            Table.open(file)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": NaN}', "1e999"])
def test_odd_json(text: str) -> None:
    """JSON that a parser chokes on is a FormatError."""
    with pytest.raises(FormatError):
        manifest.decode(text.encode(), "odd")
