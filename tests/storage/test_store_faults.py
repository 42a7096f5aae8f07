"""Tables on disk when things go wrong: failed syncs, dead writers, forks, callers that race."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyembed import Table
from pyembed.errors import ArgumentError, FormatError, ReadOnlyError, TableError
from pyembed.storage import fs
from tests.helpers import child
from tests.helpers.child import kill_writer
from tests.helpers.file_systems import Faults

ONES = np.ones((1, 2), np.float32)


@pytest.fixture
def system() -> Iterator[Faults]:
    """The file system of the tables that a test opens."""
    with fs.using(Faults()) as system:
        assert isinstance(system, Faults)
        yield system


@pytest.mark.parametrize("fail_at", range(3))
def test_failed_append_leaves_the_table(table: Path, fail_at: int, system: Faults) -> None:
    """Whichever sync of an append fails, the rows are those before, and the table can be opened."""
    t = Table.open(table)
    before = t.weight.copy()
    system.fail("sync", after=fail_at)
    with pytest.raises(OSError, match="injected"):
        t.append(3)
    system.work()
    with contextlib.suppress(OSError):
        t.close()
    with Table.open(table) as t:
        assert np.array_equal(t.weight, before)


@pytest.mark.parametrize("mode", ["r+", "r", "c"])
def test_no_address_space(table: Path, mode: str, system: Faults) -> None:
    """A table that cannot be mapped is one typed error with its remedy, and keeps no lock."""
    system.fail("map", error=errno.ENOMEM)
    with pytest.raises(TableError, match="bytes; raise the limit") as caught:
        Table.open(table, mode)
    assert caught.value.errno == errno.ENOMEM
    assert caught.value.filename == str(table / "rows.npy")
    system.work()
    Table.open(table).close()


@pytest.mark.parametrize("bare", [False, True])
def test_holes_are_filled(tmp_path: Path, system: Faults, bare: bool) -> None:
    """A file with holes has its space when it is open for writing, or is refused on a full disk."""
    path = tmp_path / ("rows.npy" if bare else "t")
    if bare:
        np.lib.format.open_memmap(path, "w+", "<f4", (1 << 16, 16)).flush()
    else:
        Table.create(path, 1 << 16, 16).close()
        with (path / "rows.npy").open("r+b") as file:  # as cp --sparse=always leaves zeros
            file.truncate(4096)
            file.truncate(4096 + (1 << 22))
    rows = path if bare else path / "rows.npy"
    assert 512 * rows.stat().st_blocks < rows.stat().st_size
    system.fail("allocate", error=errno.ENOSPC)
    with pytest.raises(TableError, match="make room"):
        Table.open(path)
    Table.open(path, "r").close()
    system.work()
    with Table.open(path) as t:
        assert 512 * rows.stat().st_blocks >= rows.stat().st_size
        assert not t.weight.any()


class FailsAt(Faults):
    """Makes the call of one number fail, once it is asked to; all later calls work."""

    def fail_at(self, number: int, error: BaseException) -> None:
        """Make one of the next calls fail; 0 is the next."""
        self.calls.clear()
        self._number, self._error = number, error

    def act(self, name: str, make: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """Make the call, or raise the error."""
        if self._error is not None and len(self.calls) == self._number + 1:
            raise self._error
        return make()

    _number = -1
    _error: BaseException | None = None


CHANGES: dict[str, Callable[[Table], object]] = {
    "step": lambda t: t.scatter_add([1], ONES),
    "append": lambda t: t.append(3),
    "commit": lambda t: t.commit(),
    "rollback": lambda t: t.rollback(),
}


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EMFILE, "x"), OSError(errno.ENOMEM, "x"), OSError(errno.EIO, "x")],
    ids=lambda error: errno.errorcode[error.errno],
)
@pytest.mark.parametrize("durability", ["process", "power", "none"])
@pytest.mark.parametrize("name", CHANGES)
def test_each_call_of_a_change_fails(
    table: Path, tmp_path: Path, name: str, durability: str, error: OSError
) -> None:
    """Whichever call fails, the change is made or not, and the table opens to its last commit.

    Unless a sync failed, later steps, commits and appends work: the error passes.
    """
    if (name, durability) == ("rollback", "none"):
        pytest.skip("no journal")
    Table.open(table, durability=durability).close()
    for number in range(99):
        folder = tmp_path / f"{number}"
        shutil.copytree(table, folder)
        with fs.using(FailsAt()) as system:
            assert isinstance(system, FailsAt)
            t = Table.open(folder)
            t.scatter_add([0], ONES)
            system.fail_at(number, error)
            with contextlib.suppress(OSError):
                CHANGES[name](t)
            reached, failed = len(system.calls) > number, system.calls[number : number + 1]
            system.fail_at(-9, error)
            if not t.store.transaction.is_poisoned:  # type: ignore[attr-defined]
                rows = t.rows
                assert rows in (4, 7)
                assert t.gather(0).tolist() in ([0, 1], [1, 2])
                t.scatter_add([rows - 1], ONES)
                t.append(1)
                t.commit()
                expected = t.weight.copy()
                t.close()
                with Table.open(folder, "r") as t:
                    assert np.array_equal(t.weight, expected)
            else:
                lost = error.errno == errno.EIO or failed[0] == "sync"
                assert lost or name == "rollback"  # rows of two times are in the file
                with contextlib.suppress(OSError):
                    t.close()
                with Table.open(folder, "r+", salvage=durability == "none") as t:
                    assert t.gather(1).tolist() in ([2, 3], [3, 4])
                    t.append(1)
        if not reached:
            return
    raise AssertionError("the change makes more calls than were tried")


def die_in_an_append(path: Path) -> None:
    """Append rows, and die at the sync that follows them."""
    with fs.using(Faults()) as system:
        assert isinstance(system, Faults)
        t = Table.open(path)
        system.fail("sync", when=lambda *_: child.die())
        t.append(9)


@pytest.mark.parametrize("salvage", [False, True])
def test_killed_append(table: Path, salvage: bool) -> None:
    """A writer that dies in the middle of an append leaves rows that recovery cuts back."""
    child.run(die_in_an_append, table, status=-signal.SIGKILL)
    with Table.open(table, salvage=salvage) as t:
        assert t.weight.tolist() == np.arange(8).reshape(4, 2).tolist()
        t.append(1)
    with Table.open(table, "r") as t:
        assert t.rows == 5


def test_failed_sync_is_not_forgotten(table: Path, system: Faults) -> None:
    """After a failed sync no later commit succeeds: the system reports a lost page only once."""
    t = Table.open(table)
    t.scatter_add([0], ONES)
    system.fail("sync")
    with pytest.raises(OSError, match="injected"):
        t.commit()
    system.work()
    for call in (t.commit, lambda: t.scatter_add([0], ONES), t.rollback, t.close):
        with pytest.raises(TableError, match="a sync or a rollback failed"):
            call()
    with Table.open(table) as t:
        assert t.gather(0).tolist() == [0, 1]


def test_failed_sync_of_an_append_is_not_forgotten(table: Path, system: Faults) -> None:
    """It may have lost rows that steps changed before: no later sync commits them."""
    t = Table.open(table)
    t.scatter_add([0], ONES)
    system.fail("sync")
    with pytest.raises(OSError, match="injected"):
        t.append(3)
    system.work()
    for call in (t.commit, lambda: t.append(3), t.close):
        with pytest.raises(TableError, match="a sync or a rollback failed"):
            call()
    with Table.open(table) as t:
        assert (t.rows, t.gather(0).tolist()) == (4, [0, 1])


@pytest.mark.parametrize("name", ["pwrite", "truncate", "sync"])
def test_half_a_rollback_is_not_committed(table: Path, name: str, system: Faults) -> None:
    """After a rollback that failed in the middle, `close` commits nothing; to open recovers."""
    t = Table.open(table)
    t.scatter_add([0], ONES)
    t.append(3)
    system.fail(name)
    with pytest.raises(OSError, match="injected"):
        t.rollback()
    system.work()
    with pytest.raises(TableError, match="a sync or a rollback failed"):
        t.close()
    with Table.open(table) as t:
        assert (t.rows, t.gather(0).tolist()) == (4, [0, 1])


def test_full_disk_after_the_manifest_has_its_name(table: Path, system: Faults) -> None:
    """The folder's sync may find the disk full: the manifest says dirty, or committed, already."""
    for number, change in (
        (1, lambda t: t.scatter_add([0], ONES)),
        (2, lambda t: t.commit({"a": 1})),
    ):
        t = Table.open(table)
        system.fail("sync", after=number, error=errno.ENOSPC)
        with pytest.raises(OSError, match="may be lost with the machine"):
            change(t)
        system.work()
        with pytest.raises(TableError, match="a sync or a rollback failed"):
            t.scatter_add([0], ONES)
        with contextlib.suppress(OSError):
            t.close()
        with Table.open(table) as t:
            assert t.gather(0).tolist() == [0, 1]


def test_a_journal_that_cannot_be_removed(table: Path, system: Faults) -> None:
    """The table closes all the same, and its lock is free."""
    t = Table.open(table)
    t.scatter_add([0], ONES)
    system.fail("unlink")
    t.close()
    system.work()
    with Table.open(table) as t:
        assert t.gather(0).tolist() == [1, 2]


def add_ones(t: Table) -> None:
    """Change the first row."""
    t.scatter_add([0], ONES)


@pytest.mark.parametrize("header", [b"(9", b"xx"])
def test_header_after_half_an_undo(table: Path, header: bytes) -> None:
    """With power, the file may be cut already where its header counts rows of before, or is torn:
    the commit comes back."""
    Table.open(table, durability="power").close()
    kill_writer(table, add_ones)
    file = table / "rows.npy"
    file.write_bytes(file.read_bytes().replace(b"(4", header, 1))
    if header == b"xx":  # who asks for the rows as they are needs it
        with pytest.raises(FormatError, match="not an .npy file"):
            Table.open(table, salvage=True)
    for mode in ("r", "r+", "r"):
        with Table.open(table, mode) as t:
            assert (t.rows, t.gather(0).tolist()) == (4, [0, 1])
    assert np.load(file).shape == (4, 4)


def test_failed_creation_leaves_nothing(path: Path, system: Faults) -> None:
    """A whole table is removed as well, if its name may not be durable."""
    system.fail("sync", after=3)
    with pytest.raises(OSError, match="injected"):
        Table.create(path, 4, 2)
    assert list(path.parent.iterdir()) == []


def fork_with_an_open_table(path: Path) -> None:
    """Fork a child that exits normally, after its change to the inherited table was refused."""
    t = Table.open(path)
    add_ones(t)
    if os.fork() == 0:
        try:
            add_ones(t)
        except ReadOnlyError:
            sys.exit(7)
    _, status = os.wait()
    assert os.waitstatus_to_exitcode(status) == 7
    assert t.state == "dirty"
    assert '"dirty"' in (path / "manifest.json").read_text()


def test_forked_child_does_not_commit(table: Path) -> None:
    """A child that inherits a writer can neither change nor commit its table, by exit either."""
    child.run(fork_with_an_open_table, table, flags=("-W", "ignore"))


@pytest.mark.parametrize("kind", ["r", "r+", "npy"])
def test_forked_child_keeps_no_lock(table: Path, kind: str) -> None:
    """A table that was closed opens again, whatever children were forked while it was open."""
    path = table / "rows.npy" if kind == "npy" else table
    t = Table.open(path, "r" if kind == "r" else "r+", durability=None)
    worker = os.fork()
    if worker == 0:
        signal.pause()
    try:
        t.close()
        Table.open(path).close()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_pickled_writer_is_a_live_reader(table: Path) -> None:
    """A worker that unpickles a table open for writing looks its rows up while the writer works."""
    with Table.open(table) as t:
        t.scatter_add([0], ONES)
        with pickle.loads(pickle.dumps(t)) as copy:
            assert not copy.writable
            assert copy.gather(0).tolist() == [1, 2]


def test_first_changes_at_once(table: Path) -> None:
    """Many threads may make the first change to a clean table; a commit waits for all of them."""
    with Table.open(table) as t:
        for _ in range(20):
            callers = [threading.Thread(target=t.scatter_add, args=([0], ONES)) for _ in range(8)]
            for caller in callers:
                caller.start()
            t.commit()
            for caller in callers:
                caller.join()
        assert t.gather(0).tolist() == [160, 161]


kept: list[Table] = []  # alive until the interpreter ends


def change_and_forget(path: Path) -> None:
    """Leave a changed table open."""
    kept.append(Table.open(path))
    add_ones(kept[0])


def test_warnings_as_errors_lose_nothing(table: Path) -> None:
    """A forgotten table is committed even where its warning is an error."""
    child.run(change_and_forget, table, flags=("-W", "error"))
    with Table.open(table, "r") as t:
        assert t.gather(0).tolist() == [1, 2]


def test_commit_refusals(table: Path) -> None:
    """No commit of a private copy, inside a block that writes, or of meta that is no dict."""
    with Table.open(table, "c") as t, pytest.raises(ReadOnlyError, match="private copy"):
        t.commit({"a": 1})
    with Table.open(table) as t:
        with t.writing([0]), pytest.raises(ArgumentError, match="writing"):
            t.commit()
        for meta in ([1], "text", 5):
            with pytest.raises(ArgumentError, match="dict"):
                t.commit(meta)  # type: ignore[arg-type]
        mine = {"step": 1}
        t.commit(mine)
        mine["step"] = 2
        assert t.meta == {"step": 1}
