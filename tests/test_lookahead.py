"""lookahead: the batches as they are, earlier pages, errors in their place, nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyembed import Embedding, Table, init, lookahead, optim
from pyembed.errors import ArgumentError, ClosedError, DTypeError, IdError
from tests.helpers import child


def helpers() -> int:
    return sum(t.name == "pyembed-lookahead" for t in threading.enumerate())


@given(
    batches=st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=8), depth=st.integers(1, 4)
)
def test_yields_what_it_takes(batches: list[list[int]], depth: int) -> None:
    """Every batch comes out, the same object, in order."""
    out = list(lookahead(batches, Table.memory(10, 2), depth))
    assert len(out) == len(batches)
    assert all(a is b for a, b in zip(out, batches, strict=True))
    assert helpers() == 0


def test_results_do_not_change(path: Path) -> None:
    """Training with and without lookahead gives the same bits."""
    Table.create(path, 5000, 8, "adagrad", init=init.normal()).close()
    there = Table.memory(5000, 8, "adagrad", init=init.normal())
    batches = list(np.random.default_rng(0).integers(0, 5000, (20, 300)))
    with Table.open(path) as t:
        for table, loop in ((t, lookahead(batches, t)), (there, iter(batches))):
            o = optim.Adagrad(table, lr=0.1)
            for ids in loop:
                o.step(ids, table.gather(ids) - 1)
        assert np.array_equal(t.weight, there.weight)


def test_ids_of_a_batch() -> None:
    """`ids` says where a batch has its ids; a layer stands for its table."""
    layer = Embedding(10, 2, seed=0)
    batches: list[dict[str, Any]] = [{"ids": [1, 2], "label": 0}, {"ids": [3], "label": 1}]
    out = list(lookahead(batches, layer, ids=lambda batch: batch["ids"]))
    assert [batch["label"] for batch in out] == [0, 1]
    with pytest.raises(DTypeError):
        list(lookahead(batches, layer))


def test_at_most_depth_ahead() -> None:
    """No more than `depth` batches are taken before the loop asks for them."""
    taken = []

    def source() -> Iterator[list[int]]:
        for i in range(100):
            taken.append(i)
            yield [0]

    loop = lookahead(source(), Table.memory(1, 1), depth=3)
    for used in range(1, 10):
        next(loop)
        time.sleep(0.02)
        assert len(taken) <= used + 3
    loop.close()


def test_errors_come_in_their_place() -> None:
    """An exception of the source, or a bad id, is raised after the batches before it."""
    t = Table.memory(3, 1)

    def source() -> Iterator[list[int]]:
        yield [0]
        yield [1]
        raise RuntimeError("no more")

    loop = lookahead(source(), t, depth=8)
    assert [next(loop), next(loop)] == [[0], [1]]
    with pytest.raises(RuntimeError, match="no more"):
        next(loop)
    loop = lookahead([[0], [7], [1]], t, depth=8)
    assert next(loop) == [0]
    with pytest.raises(IdError, match=r"ids\[0\] = 7"):
        next(loop)
    assert helpers() == 0


def test_a_loop_that_ends_early_leaves_nothing() -> None:
    """After a break the thread is gone and the source is closed."""
    closed = threading.Event()

    def source() -> Iterator[list[int]]:
        try:
            while True:
                yield [0]
        finally:
            closed.set()

    loop = lookahead(source(), Table.memory(1, 1))
    for _ in loop:
        break
    loop.close()
    assert helpers() == 0
    assert closed.is_set()


def test_closed_table() -> None:
    """A table that is closed under the loop ends it with an error that says so."""
    t = Table.memory(1, 1)
    loop = lookahead([[0]] * 10, t, depth=1)
    next(loop)
    t.close()
    with pytest.raises(ClosedError):
        list(loop)


def test_bad_arguments() -> None:
    """Depth and table are checked at the call."""
    with pytest.raises(ArgumentError, match="depth = 0"):
        lookahead([], Table.memory(1, 1), depth=0)
    with pytest.raises(DTypeError, match="allowed: a Table"):
        lookahead([], np.zeros((1, 1)))  # type: ignore[arg-type]


def take_one_batch_of_a_blocked_source() -> None:
    """Leave a loop whose source waits for far longer than a test."""

    def source() -> Iterator[list[int]]:
        yield [0]
        time.sleep(1000)

    for _ in lookahead(source(), Table.memory(1, 1)):
        break
    print("end", flush=True)


def test_a_source_that_blocks_does_not_keep_the_process() -> None:
    """A process whose source never gives its next batch ends all the same."""
    assert child.run(take_one_batch_of_a_blocked_source).stdout == "end\n"
