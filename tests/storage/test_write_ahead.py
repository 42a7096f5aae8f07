"""Writing ahead: with "power", old rows are synced on a helper thread before a step asks for it."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pyembed import Table, init, lookahead, optim
from pyembed.errors import TableError
from pyembed.storage import fs, journal
from pyembed.storage.transaction import MAX_ASKED

ROWS, DIM = 400, 4


def make(path: Path, durability: str = "power") -> Table:
    """A table that is dirty: row 0 was changed."""
    Table.create(path, ROWS, DIM, "adagrad", init=init.normal(), durability=durability).close()
    table = Table.open(path)
    change(table, [0])
    return table


def change(table: Table, ids: list[int]) -> None:
    table.scatter_add(ids, np.ones((len(ids), table.dim), np.float32))


def ask(table: Table, ids: list[int]) -> None:
    table.prefetch(ids, wait=True)


def wait(table: Table) -> None:
    """Until the helper has done what it was asked for."""
    table._store._interval._helper.submit(int).result()  # type: ignore[union-attr]


@contextmanager
def busy_helper(table: Table) -> Iterator[None]:
    """The helper comes to nothing before the block ends."""
    free = threading.Event()
    table._store._interval._helper.submit(free.wait)  # type: ignore[union-attr]
    try:
        yield
    finally:
        free.set()
        wait(table)


class Held:
    """Holds the helper up in a sync, with the mutex, until `go_on`; then perhaps fails it."""

    def __init__(self, patch: pytest.MonkeyPatch, fails: bool = False) -> None:
        self._begun, self._go_on, self._fails = threading.Event(), threading.Event(), fails
        patch.setattr(journal, "sync", self._sync)

    def _sync(self, fd: int) -> None:
        if on_helper():
            self._begun.set()
            self._go_on.wait()
            if self._fails:
                raise OSError(errno.EIO, "injected")

    def there(self) -> None:
        self._begun.wait()

    def go_on(self, after: float = 0.0) -> None:
        threading.Timer(after, self._go_on.set).start()

    @property
    def still(self) -> bool:
        return not self._go_on.is_set()


def on_helper() -> bool:
    return threading.current_thread().name.startswith("pyembed-journal")


def frames(table: Table) -> int:
    return table._store._interval.journal.frames  # type: ignore[union-attr]


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each sync, whether it was the helper's."""
    found = list[bool]()

    def sync(fd: int) -> None:
        found.append(on_helper())
        os.fsync(fd)

    for module in (fs, journal):
        monkeypatch.setattr(module, "sync", sync)
    return found


def test_a_step_finds_it_done(path: Path, syncs: list[bool]) -> None:
    """A step on rows that were prefetched syncs nothing; the helper synced for it, once."""
    with make(path) as t:
        syncs.clear()
        ask(t, [5, 3, 5])
        wait(t)
        assert syncs == [True]
        change(t, [3, 5])
        assert len(syncs) == 1
        change(t, [3, 6])
        assert len(syncs) == 2


def test_lookahead_writes_ahead(path: Path, syncs: list[bool]) -> None:
    """A loop over `lookahead` does so, while a bare gather, which may be of a test, does not."""
    with make(path) as t:
        t.gather([1, 2])
        wait(t)
        assert frames(t) == 2
        for ids in lookahead([[1, 2], [3, 4]], t, depth=2):
            wait(t)
            syncs.clear()
            change(t, ids)
            assert not syncs


@pytest.mark.parametrize("durability", ["process", "none"])
def test_only_with_power(path: Path, durability: str) -> None:
    """Where no sync is waited for, nothing is gained, and nothing done."""
    with make(path, durability) as t:
        before = 0 if durability == "none" else frames(t)
        ask(t, [1])
        if durability != "none":
            wait(t)
            assert frames(t) == before


def test_a_clean_table_stays_clean(path: Path) -> None:
    """Rows of a table that nobody changed since its commit are not written anywhere."""
    with make(path) as t:
        t.commit()
        ask(t, [1])
        wait(t)
        assert t.state == "clean"


def test_many_batches_are_one_sync(path: Path, syncs: list[bool]) -> None:
    """What is asked for while the helper is at work is recorded together; ids may change then."""
    with make(path) as t:
        syncs.clear()
        before = frames(t)
        with busy_helper(t):
            ids = np.array([7, 8])
            ask(t, ids)  # type: ignore[arg-type]
            ids[:] = 300
            ask(t, [8, 9])
            for _ in range(MAX_ASKED - 2):
                ask(t, [9])
        assert (len(syncs), frames(t)) == (1, before + 1)
        change(t, [7, 8, 9])
        assert len(syncs) == 1
        change(t, [300])
        assert len(syncs) == 2


@pytest.mark.parametrize("end", [Table.commit, Table.rollback])
@pytest.mark.parametrize("again", [False, True])
def test_late_for_its_interval(path: Path, end: Callable[[Table], None], again: bool) -> None:
    """Nothing is recorded once the interval has ended; in the next, only what it has of its own."""
    with make(path) as t:
        with busy_helper(t):
            ask(t, [5])
            end(t)
            if again:
                change(t, [1])
            kept = frames(t)
        assert t.state == ("dirty" if again else "clean")
        assert frames(t) == kept + again
        before = t.gather(5).tolist()
        change(t, [5])
        t.rollback()
        assert t.gather(5).tolist() == before


@pytest.mark.parametrize("end", [Table.commit, Table.rollback])
def test_an_interval_does_not_end_amid_it(
    path: Path, end: Callable[[Table], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row is marked for the next interval whose old content lies in the journal of this."""
    with make(path) as t:
        held = Held(monkeypatch)
        ask(t, [5])
        held.there()
        held.go_on(after=0.2)
        end(t)
        assert not held.still
        change(t, [1])
        before = t.gather(5).tolist()
        change(t, [5])
        t.rollback()
        assert t.gather(5).tolist() == before


def test_what_is_safe_does_not_wait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step on rows that are marked goes on beside a sync of others."""
    with make(path) as t:
        held = Held(monkeypatch)
        ask(t, [5])
        held.there()
        held.go_on(after=5)
        change(t, [0])
        assert held.still
        held.go_on()


def test_rows_that_are_gone(path: Path) -> None:
    """Of rows that were appended and rolled back since, nothing is kept."""
    with make(path) as t:
        t.append(5)
        with busy_helper(t):
            ask(t, [ROWS + 4, 2])
            t.rollback()
            change(t, [1])
        assert (t.rows, frames(t)) == (ROWS, 2)


def fail_on_helper(patch: pytest.MonkeyPatch, name: str, code: int) -> None:
    real = getattr(os, name)

    def failing(*args: object) -> object:
        if on_helper():
            raise OSError(code, "injected")
        return real(*args)

    patch.setattr(os, name, failing)


def test_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no error of who asked: the step meets it, if there is no room for it either."""
    with make(path) as t:
        before = t.weight.copy()
        t.commit()
        change(t, [0])
        with monkeypatch.context() as patch:
            fail_on_helper(patch, "pwritev", errno.ENOSPC)
            ask(t, [5])
            wait(t)
        change(t, [5])
        t.rollback()
        assert np.array_equal(t.weight, before)


def test_failed_sync(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one on the helper no row changes, nothing is committed; opened again, all is well."""
    t = make(path)
    before = t.gather(5).tolist()
    with monkeypatch.context() as patch:
        fail_on_helper(patch, "fsync", errno.EIO)
        ask(t, [5])
        wait(t)
    ask(t, [6])
    for call in (lambda: change(t, [5]), t.commit, t.rollback, t.close):
        with pytest.raises(TableError, match="a sync or an undo failed"):
            call()
    with Table.open(path) as t:
        assert t.gather(5).tolist() == before


def test_a_commit_that_waits_hears_of_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync that fails on the helper while a commit waits for its end: nothing is committed."""
    t = make(path)
    with monkeypatch.context() as patch:
        held = Held(patch, fails=True)
        ask(t, [5])
        held.there()
        held.go_on(after=0.05)
        with pytest.raises(TableError, match="a sync or an undo failed"):
            t.commit()
    with pytest.raises(TableError):
        t.close()
    with Table.open(path, "r") as t:
        assert t.generation == 0


def test_interrupted_end_of_an_interval(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C right after a commit was written: the next interval begins without marks of this."""
    with make(path) as t:
        touched = t._store._interval.touched  # type: ignore[union-attr]

        def interrupted(rows: int) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(touched, "commit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                t.commit()
        before = t.gather(0).tolist()
        change(t, [0])
        t.rollback()
        assert t.gather(0).tolist() == before


@pytest.mark.parametrize("drop", ["del t", "t.loop = t; del t; gc.collect()"])
def test_a_forgotten_table(path: Path, drop: str) -> None:
    """Dropped while the helper is at work, it is committed, and its lock is free after that."""
    make(path).close()
    code = (
        "import gc, os, time, threading, warnings, numpy, pyembed\n"
        "from pyembed.storage import journal\n"
        "warnings.simplefilter('ignore')\n"
        f"t = pyembed.Table.open({str(path)!r})\n"
        "t.scatter_add([1], numpy.full((1, 4), 50, numpy.float32))\n"
        "begun, go_on = threading.Event(), threading.Event()\n"
        "journal.sync = lambda fd: (begun.set(), go_on.wait())\n"
        "t.prefetch([5], wait=True)\n"
        "begun.wait()\n"
        f"{drop}\n"
        "go_on.set()\n"
        "for _ in range(1000):\n"
        "    gc.collect()\n"
        "    try:\n"
        f"        with pyembed.Table.open({str(path)!r}) as t:\n"
        "            assert t.gather(1).min() > 40\n"
        "        break\n"
        "    except pyembed.errors.LockedError:\n"
        "        time.sleep(0.01)\n"
        "else:\n"
        "    raise AssertionError('locked')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_fork_while_the_helper_works(path: Path) -> None:
    """A child asks nobody, waits for nothing, and leaves the table to its parent."""
    make(path).close()
    code = (
        "import os, sys, threading, numpy, pyembed\n"
        "from pyembed.storage import journal\n"
        f"t = pyembed.Table.open({str(path)!r})\n"
        "t.scatter_add([1], numpy.ones((1, 4), numpy.float32))\n"
        "begun, go_on, sync = threading.Event(), threading.Event(), journal.sync\n"
        "journal.sync = lambda fd: (begun.set(), go_on.wait(), sync(fd))\n"
        "t.prefetch([5], wait=True)\n"
        "begun.wait()\n"
        "if os.fork() == 0:\n"
        "    t.prefetch([6], wait=True)\n"
        "    assert not t._store._interval._asked\n"
        "    for call in (t.commit, t.rollback, t.close):\n"
        "        try:\n"
        "            call()\n"
        "        except pyembed.errors.ReadOnlyError:\n"
        "            continue\n"
        "        os._exit(1)\n"
        "    os._exit(7)\n"
        "_, status = os.wait()\n"
        "assert os.waitstatus_to_exitcode(status) == 7\n"
        "go_on.set()\n"
        "t.close()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with Table.open(path, "r") as t:
        assert t.generation == 2


def test_ends_of_intervals_race_with_the_helper(path: Path) -> None:
    """Steps, appends, commits and rollbacks beside a helper that is never idle: the rows are those
    of a table in memory at every end."""
    rng = np.random.default_rng(3)
    make(path).close()
    with Table.open(path) as t:
        kept = {name: t.column(name).copy() for name in t.columns}
        optimizer = optim.Adagrad(t, lr=0.1)
        for turn in range(120):
            for ids in lookahead(list(rng.integers(0, ROWS, (4, 30))), t, depth=3):
                optimizer.step(ids, np.ones((30, DIM), np.float32))
            ask(t, list(rng.integers(0, ROWS, 200)))
            if turn % 2:
                t.rollback()
                assert all(np.array_equal(kept[name], t.column(name)) for name in kept)
            else:
                t.commit()
                kept = {name: t.column(name).copy() for name in t.columns}
        gc.collect()
