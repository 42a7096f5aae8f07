"""Steps of many tables at once: the bits of single steps, and all checks before any write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Batch, batches
from test_optim import RULES

from pyembed import EmbeddingBag, SparseGrad, Table, _core, grouping, init, optim, reference
from pyembed.errors import ArgumentError, IdError, NonFiniteError
from pyembed.optim import step_many


@given(several=st.lists(batches(), max_size=5))
def test_group_many(several: list[Batch], workers: int) -> None:
    """Many batches are grouped as each by itself."""
    pairs = [(batch.ids, batch.rows) for batch in several]
    found = _core.group_many(pairs, workers)
    for got, expected in zip(found, reference.group_many(pairs), strict=True):
        for one, other in zip(got, expected, strict=True):
            assert np.array_equal(one, other)


@given(several=st.lists(batches(), max_size=4))
def test_update_many(several: list[Batch], simd: str, workers: int) -> None:
    """Threads share the gradients of all tables; the bits are those of single updates."""
    got, expected, steps, sums = [], [], [], []
    hyper = _core.HYPER | {"lr": 0.1}
    for batch in several:
        rows = np.resize(np.random.default_rng(1).random(997, np.float32), (70000, batch.dim))
        got.append(rows[: batch.rows].copy())
        expected.append(got[-1].copy())
        grad = batch.grad().reshape(-1, batch.dim)
        groups = reference.group(batch.ids, batch.rows)
        column = _core.Column(got[-1])
        steps.append(((column,), *groups, grad, "sgd", hyper, -1, False, None, None, None))
        total = reference.sum_groups(*groups, grad)
        sums.append(((expected[-1],), groups[0], total, "sgd", hyper))
    assert _core.update_many(steps, workers) == [0] * len(several)
    reference.update_many(sums)
    for one, other in zip(got, expected, strict=True):
        assert one.tobytes() == other.tobytes()


def layers(folder: Path | None, workers: int) -> list[optim.Optimizer]:
    """An optimizer of every rule, each over a table of its own, some on disk, one over bags."""
    made = []
    for at, (name, make) in enumerate(RULES.items()):
        start, dim = init.normal(std=1.0), 3 + at
        if folder is not None and at % 3 == 0:
            t = Table.create(folder / name, 40, dim, name, init=start, num_threads=workers)
        else:
            t = Table.memory(40, dim, name, init=start, num_threads=workers)
        target = t if at != 1 else EmbeddingBag.from_pretrained(t, freeze=False, mode="mean")
        options = {4: {"clip_norm": 3.0}, 5: {"max_norm": 2.0}, 7: {"frequency_power": 0.5}}
        made.append(make(target, lr=0.1, **options.get(at, {})))
    return made


def test_step_many_is_each_step(tmp_path: Path, simd: str, workers: int) -> None:
    """Every rule, tables in memory and on disk, bags and sparse gradients, over 5 steps."""
    rng = np.random.default_rng(8)
    many, single = layers(tmp_path, workers), layers(None, 1)
    for _ in range(5):
        steps = []
        for at, o in enumerate(many):
            ids = rng.integers(0, 40, rng.integers(0, 3000))
            grad = rng.standard_normal((ids.size, o.table.dim), np.float32)
            if at == 1:
                bags = o._layer.bags(ids, np.arange(0, ids.size, 2))
                steps.append((o, bags, grad[: len(bags)]))
            elif at == 2:
                sparse = grouping.sum_duplicates(ids, grad, 40, o.table.dim)
                steps.append((o, sparse, None))
            else:
                steps.append((o, ids, grad))
        step_many(steps)
        for (_, ids, grad), o in zip(steps, single, strict=True):
            o.step(ids, grad)
    for o, other in zip(many, single, strict=True):
        assert o.steps == other.steps == 5
        assert np.array_equal(o.table.weight, other.table.weight)
        o.table.close()


def test_nothing_is_written_if_one_batch_is_bad() -> None:
    """An error in the last table's batch comes before the first table is changed."""
    tables = [Table.memory(4, 2) for _ in range(3)]
    made = [optim.SGD(t) for t in tables]
    ones = np.ones((1, 2), np.float32)
    for error, ids, grad in [
        (IdError, [4], ones),
        (NonFiniteError, [0], ones * np.nan),
        (ArgumentError, [0, 1], ones),
        (ArgumentError, SparseGrad(np.array([0]), ones), ones),
    ]:
        with pytest.raises(error):
            step_many([(made[0], [1], ones), (made[1], [1], ones), (made[2], ids, grad)])
    with pytest.raises(ArgumentError, match="over one table"):
        step_many([(made[0], [1], ones), (optim.SGD(tables[0]), [1], ones)])
    assert not any(t.weight.any() for t in tables)
    assert [o.steps for o in made] == [0, 0, 0]
    step_many([])
