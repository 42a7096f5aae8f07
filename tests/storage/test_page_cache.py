"""Tables whose rows are not in memory: the same results, and numbers that say what happened."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyembed import EmbeddingBag, Table, _core, init, optim
from pyembed.errors import ArgumentError, DTypeError, IdError
from pyembed.storage import page_cache
from tests.helpers import child

ROWS, DIM = 40_000, 64  # 10 MB of weights, 2500 pages


def forget(path: Path) -> None:
    """Take a table's pages out of the page cache; it must not be open."""
    fd = os.open(path / "rows.npy", os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    found = _core.cached_pages(fd)
    os.close(fd)
    if found is None or found[0] > 100:
        pytest.skip("this file system does not give pages back")


@pytest.fixture
def cold(path: Path) -> Path:
    """A table with Adagrad state, none of whose pages are in memory."""
    Table.create(path, ROWS, DIM, "adagrad", init=init.uniform(-1, 1)).close()
    forget(path)
    return path


def twin() -> Table:
    """The same rows in memory."""
    return Table.memory(ROWS, DIM, "adagrad", init=init.uniform(-1, 1))


def ids_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, ROWS, n)


def gather(t: Table, ids: np.ndarray) -> None:
    t.gather(ids)


def step(t: Table, ids: np.ndarray) -> None:
    optim.Adagrad(t, lr=0.1).step(ids, np.ones((ids.size, DIM), np.float32))


def bags(t: Table, ids: np.ndarray) -> None:
    EmbeddingBag.from_pretrained(t)(ids.reshape(-1, 10))


def scatter(t: Table, ids: np.ndarray) -> None:
    t.scatter_add(np.unique(ids), np.ones((np.unique(ids).size, DIM), np.float32))


def renorm(t: Table, ids: np.ndarray) -> None:
    t.renorm(ids, 0.5)


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("call", [gather, step, bags, scatter, renorm])
def test_same_results(cold: Path, call: Callable[..., None], dtype: Any, num_threads: int) -> None:
    """Each operation requests readahead of cold rows, and its result is that in memory."""
    ids, there = ids_of(5000).astype(dtype), twin()
    with Table.open(cold, num_threads=num_threads) as t:
        assert t.stats().cold_batches == 0
        call(t, ids)
        call(there, ids)
        assert np.array_equal(t.gather(ids), there.gather(ids))
        stats = t.stats()
        assert stats.cold_batches >= 1
        assert stats.cold_rows >= np.unique(ids).size
        assert stats.hit_rate < 1
        assert 0 < stats.pages_asked <= 2 * stats.cold_rows
    with Table.open(cold) as t:
        assert np.array_equal(t.weight, there.weight)


@given(n=st.integers(0, 3000), spread=st.sampled_from([1, 50, ROWS]))
def test_any_batch(tmp_path_factory: pytest.TempPathFactory, n: int, spread: int) -> None:
    """Batches of any size, of few rows or of all, come out right from a cold table."""
    path = tmp_path_factory.mktemp("cold") / "t.pyembed"
    Table.create(path, ROWS // 10, DIM, init=init.normal()).close()
    forget(path)
    ids = ids_of(n) % min(spread, ROWS // 10)
    with Table.open(path, "r") as t:
        assert np.array_equal(t.gather(ids), np.load(path / "rows.npy")[ids])


def test_a_resident_table_is_not_asked_for(cold: Path) -> None:
    """Once samples find everything in memory, no page is asked for; a prefetch finds the same."""
    with Table.open(cold, "r") as t:
        for _ in range(4):
            t.gather(np.arange(ROWS))
        stats = t.stats()
        t.gather(np.arange(ROWS))
        t.prefetch(np.arange(ROWS))
        assert t.stats() == stats
        assert stats.resident_bytes is not None
        assert stats.resident_bytes >= 4 * ROWS * 2 * DIM


def test_page_faults_wake_it_up(cold: Path) -> None:
    """A table that was resident and is pushed out of memory counts as cold again."""
    with Table.open(cold) as t:
        for _ in range(4):
            t.gather(np.arange(ROWS))
        before = t.stats().cold_batches
        for name in t.columns:
            assert t.column(name).shape[0] == ROWS
        assert _core.page_out(t.store.array)  # type: ignore[attr-defined]
        for seed in range(3):
            t.gather(ids_of(8192, seed))
        assert t.stats().cold_batches > before


def test_prefetch_asks(cold: Path) -> None:
    """After a prefetch the pages come into memory without being touched."""
    ids = ids_of(3000)
    with Table.open(cold, "r") as t:
        t.prefetch(ids)
        assert t.stats().pages_asked > 0
        end = time.monotonic() + 20
        while time.monotonic() < end and (t.stats().resident_bytes or 0) < 4096 * 2000:
            time.sleep(0.01)
        assert (t.stats().resident_bytes or 0) >= 4096 * 2000


def test_bad_ids_are_refused_first(cold: Path) -> None:
    """An id outside the table is refused before a page is asked for."""
    with Table.open(cold, "r") as t:
        with pytest.raises(IdError, match=r"ids\[2\] = 40000 is outside 0..39999"):
            t.prefetch([0, 1, ROWS])
        with pytest.raises(IdError):
            t.gather([-1])
        assert t.stats().pages_asked == 0


def test_in_memory() -> None:
    """A table in memory is resident, whatever is asked; prefetch does nothing."""
    t = twin()
    t.prefetch([1, 2])
    assert t.stats().resident_bytes == t.nbytes == t.stats().nbytes
    assert t.stats().bytes_read is None


def test_memory_limit(path: Path) -> None:
    """The pages of a table that is read and changed stay near the limit; no change is lost."""
    rows, limit = 400_000, 16 << 20  # 100 MB
    Table.create(path, rows, DIM, init=init.zeros()).close()
    forget(path)
    ids = np.random.default_rng(0).integers(0, rows, (60, 2048))
    with Table.open(path, memory_limit=limit) as t:
        o = optim.SGD(t, lr=1.0)
        for batch in ids:
            o.step(batch, np.full((2048, DIM), -1, np.float32))
        end = time.monotonic() + 20
        while time.monotonic() < end and (t.stats().resident_bytes or 0) > 2 * limit:
            time.sleep(0.05)
        assert (t.stats().resident_bytes or 0) <= 2 * limit
        seen = np.bincount(ids.ravel(), minlength=rows)
        assert np.array_equal(t.weight[:, 0], seen)
        assert np.array_equal(t.weight[:, DIM - 1], seen)


@pytest.mark.parametrize("value", [0, 5, -1, 0.0, 1.5, float("nan"), True, "1G"])
def test_bad_memory_limit(cold: Path, value: object) -> None:
    """A limit is bytes of some use, or a share of the memory; nothing is opened otherwise."""
    with pytest.raises((ArgumentError, DTypeError), match="memory_limit = .*allowed"):
        Table.open(cold, memory_limit=value)  # type: ignore[arg-type]
    Table.open(cold).close()


def test_share_of_memory() -> None:
    """A float is a share of what this process may use, which is never more than the machine has."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert page_cache.limit_bytes(0.5) == page_cache.memory_bytes() // 2
    assert 0 < page_cache.memory_bytes() <= machine


def helpers() -> int:
    return sum(t.name == "pyembed-pages" for t in threading.enumerate())


def test_the_helper_thread_ends(cold: Path) -> None:
    """The thread that looks after pages ends with its table: closed, or dropped."""
    before = helpers()
    t = Table.open(cold, memory_limit=0.5)
    assert helpers() == before + 1
    t.close()
    assert helpers() == before
    t = Table.open(cold, "r", memory_limit=0.5)
    del t
    gc.collect()
    assert helpers() == before


def test_helper_starts_with_cold_changes_only(cold: Path) -> None:
    """Lookups start no thread, nor do changes of resident rows; changes of cold rows do."""
    before = helpers()
    with Table.open(cold) as t:
        t.gather(ids_of(100))
        assert helpers() == before
        step(t, ids_of(100))
        assert helpers() == before + 1
    assert helpers() == before


def gather_after_truncation(path: Path) -> None:
    """Read rows that the file has lost since it was opened."""
    with Table.open(path, "r") as t:
        os.truncate(path / "rows.npy", 4096 * 100)
        t.gather(np.arange(ROWS))


def test_truncation_is_no_silent_zero(cold: Path) -> None:
    """A file that another process cuts short ends this one with SIGBUS: no zeros are read."""
    child.run(gather_after_truncation, cold, status=-signal.SIGBUS)


def gather_until_interrupted(path: Path) -> None:
    """Print "go", look rows up until Ctrl-C, then print "heard"."""
    with Table.open(path, "r") as t:
        ids = np.random.default_rng(0).integers(0, t.rows, 1 << 21)
        print("go", flush=True)
        try:
            while True:
                t.gather(ids)
        except KeyboardInterrupt:
            print("heard", flush=True)


def test_interrupted_gather(cold: Path) -> None:
    """Ctrl-C in the middle of lookups of a cold table is heard, and the table is as it was."""
    with child.start(gather_until_interrupted, cold) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "go\n"
        time.sleep(0.2)
        run.send_signal(signal.SIGINT)
        assert run.stdout.readline() == "heard\n"
        assert run.wait(10) == 0
