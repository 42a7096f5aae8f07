"""Writing ahead: with "power", old rows are synced on a helper thread before a step asks for it."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pyembed import Table, init, lookahead, optim
from pyembed.errors import LockedError, ReadOnlyError, TableError
from pyembed.storage import fs
from pyembed.storage.transaction import MAX_AHEAD
from tests.helpers import child
from tests.helpers.file_systems import HeldHelper, on_helper

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
    """Wait until the helper has done all its tasks."""
    helper().submit(int).result()


@contextmanager
def busy_helper(table: Table) -> Iterator[None]:
    """Keep the helper busy until the block ends."""
    free = threading.Event()
    helper().submit(free.wait)
    try:
        yield
    finally:
        free.set()
        wait(table)


def frames(table: Table) -> int:
    """The number of frames in the journal of the transaction."""
    return table.store.transaction.frames  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(autouse=True)
def held() -> Iterator[HeldHelper]:
    """The file system of the tables that a test opens."""
    with fs.using(HeldHelper()) as system:
        assert isinstance(system, HeldHelper)
        yield system


def helper() -> fs.Helper:
    """The helper of the table that was opened last."""
    system = fs.current()
    assert isinstance(system, HeldHelper)
    return system.helpers[-1]


@pytest.fixture
def syncs(held: HeldHelper) -> list[bool]:
    """Of each sync, whether the helper made it."""
    return held.syncs


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
    """Batches requested while the helper works are recorded together; their ids may change."""
    with make(path) as t:
        syncs.clear()
        before = frames(t)
        with busy_helper(t):
            ids = np.array([7, 8])
            ask(t, ids)  # type: ignore[arg-type]
            ids[:] = 300
            ask(t, [8, 9])
            for _ in range(MAX_AHEAD - 2):
                ask(t, [9])
        assert (len(syncs), frames(t)) == (1, before + 1)
        change(t, [7, 8, 9])
        assert len(syncs) == 1
        change(t, [300])
        assert len(syncs) == 2


@pytest.mark.parametrize("end", [Table.commit, Table.rollback])
@pytest.mark.parametrize("again", [False, True])
def test_late_for_its_transaction(path: Path, end: Callable[[Table], None], again: bool) -> None:
    """Nothing is recorded after the transaction; the next one records its own rows alone."""
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
def test_no_transaction_ends_while_the_helper_records(
    path: Path, end: Callable[[Table], None], held: HeldHelper
) -> None:
    """No row is marked for the next transaction whose old content is in the journal of this one."""
    with make(path) as t:
        held.hold()
        ask(t, [5])
        held.wait_until_held()
        held.go_on(after=0.2)
        end(t)
        assert not held.is_holding
        change(t, [1])
        before = t.gather(5).tolist()
        change(t, [5])
        t.rollback()
        assert t.gather(5).tolist() == before


def test_what_is_safe_does_not_wait(path: Path, held: HeldHelper) -> None:
    """A step on rows that are marked does not wait for a sync of other rows."""
    with make(path) as t:
        held.hold()
        ask(t, [5])
        held.wait_until_held()
        held.go_on(after=5)
        change(t, [0])
        assert held.is_holding
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


def test_full_disk(path: Path, held: HeldHelper) -> None:
    """A helper that finds the disk full raises nothing: the step reports it, if it does as well."""
    with make(path) as t:
        before = t.weight.copy()
        t.commit()
        change(t, [0])
        held.fail("pwrite", error=errno.ENOSPC, when=lambda *_: on_helper())
        ask(t, [5])
        wait(t)
        held.work()
        change(t, [5])
        t.rollback()
        assert np.array_equal(t.weight, before)


def test_failed_sync(path: Path, held: HeldHelper) -> None:
    """After one on the helper no row changes, nothing is committed; opened again, all is well."""
    t = make(path)
    before = t.gather(5).tolist()
    held.fail("sync", when=lambda *_: on_helper())
    ask(t, [5])
    wait(t)
    held.work()
    ask(t, [6])
    for call in (lambda: change(t, [5]), t.commit, t.rollback, t.close):
        with pytest.raises(TableError, match="a sync or a rollback failed"):
            call()
    with Table.open(path) as t:
        assert t.gather(5).tolist() == before


def test_a_commit_that_waits_hears_of_it(path: Path, held: HeldHelper) -> None:
    """A sync that fails on the helper while a commit waits for its end: nothing is committed."""
    t = make(path)
    held.hold(fails=True)
    ask(t, [5])
    held.wait_until_held()
    held.go_on(after=0.05)
    with pytest.raises(TableError, match="a sync or a rollback failed"):
        t.commit()
    with pytest.raises(TableError):
        t.close()
    with Table.open(path, "r") as t:
        assert t.generation == 0


def test_interrupted_end_of_a_transaction(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C right after a commit was written: the next transaction begins without its marks."""
    with make(path) as t:
        dirty_rows = t.store.transaction._dirty_rows  # type: ignore[attr-defined]

        def interrupted(rows: int) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(dirty_rows, "commit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                t.commit()
        before = t.gather(0).tolist()
        change(t, [0])
        t.rollback()
        assert t.gather(0).tolist() == before


def drop_while_the_helper_works(path: Path, in_a_cycle: bool) -> None:
    """Drop a table during a sync of its helper, and wait until it can be opened again."""
    warnings.simplefilter("ignore")
    with fs.using(HeldHelper()) as held:
        assert isinstance(held, HeldHelper)
        t = Table.open(path)
        change(t, [1])
        held.hold()
        ask(t, [5])
        held.wait_until_held()
        if in_a_cycle:
            t.loop = t  # type: ignore[attr-defined]
        del t
        gc.collect()
        held.go_on()
        for _ in range(1000):
            gc.collect()
            with contextlib.suppress(LockedError), Table.open(path) as t:
                assert t.generation == 2
                return
            time.sleep(0.01)
    raise AssertionError("locked")


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_a_forgotten_table(path: Path, in_a_cycle: bool) -> None:
    """A table that is dropped while its helper works is committed, and its lock is free then."""
    make(path).close()
    child.run(drop_while_the_helper_works, path, in_a_cycle)


def fork_while_the_helper_works(path: Path) -> None:
    """Fork during a sync of the helper; the child may neither change nor end the transaction."""
    with fs.using(HeldHelper()) as held:
        assert isinstance(held, HeldHelper)
        t = Table.open(path)
        change(t, [1])
        held.hold()
        ask(t, [5])
        held.wait_until_held()
        if os.fork() == 0:
            ask(t, [6])
            for call in (t.commit, t.rollback, t.close):
                try:
                    call()
                except ReadOnlyError:
                    continue
                os._exit(1)
            os._exit(7)
        _, status = os.wait()
        assert os.waitstatus_to_exitcode(status) == 7
        held.go_on()
        t.close()


def test_fork_while_the_helper_works(path: Path) -> None:
    """A child does not wait for the helper, and leaves the table to its parent."""
    make(path).close()
    child.run(fork_while_the_helper_works, path)
    with Table.open(path, "r") as t:
        assert t.generation == 2


def test_ends_of_transactions_race_with_the_helper(path: Path) -> None:
    """Steps, appends, commits and rollbacks while the helper is never idle: the rows are those
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
