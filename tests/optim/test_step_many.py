"""Steps of many tables at once: the bits of single steps, and all checks before any write."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyembed import Embedding, EmbeddingBag, SparseGrad, Table, grouping, init, optim
from pyembed.errors import ArgumentError, ClosedError, IdError, NonFiniteError, ReadOnlyError
from pyembed.layers import Bags
from pyembed.optim import step_many
from pyembed.optim.optimizer import MAX_LAZY_STEPS
from tests.optim.rules import RULES
from tests.reference import kernels
from tests.strategies import Batch, batches

Step = tuple[optim.Optimizer, Any, Any]
ONES = np.ones((1, 2), np.float32)


def layers(folder: Path | None, num_threads: int) -> list[optim.Optimizer]:
    """An optimizer of every rule, each over a table of its own, some on disk, one over bags."""
    made = []
    for at, (name, make) in enumerate(RULES.items()):
        start, dim = init.normal(std=1.0), 3 + at
        if folder is not None and at % 3 == 0:
            t = Table.create(folder / name, 40, dim, name, init=start, num_threads=num_threads)
        else:
            t = Table.memory(40, dim, name, init=start, num_threads=num_threads)
        target = t if at != 1 else EmbeddingBag.from_pretrained(t, freeze=False, mode="mean")
        options = {4: {"clip_norm": 3.0}, 5: {"max_norm": 2.0}, 7: {"frequency_power": 0.5}}
        made.append(make(target, lr=0.1, **options.get(at, {})))
    return made


def test_step_many_is_each_step(tmp_path: Path, simd: str, num_threads: int) -> None:
    """Every rule, tables in memory and on disk, bags and sparse gradients, over 5 steps."""
    rng = np.random.default_rng(8)
    many, single = layers(tmp_path, num_threads), layers(None, 1)
    for _ in range(5):
        steps: list[Any] = []
        for at, o in enumerate(many):
            ids = rng.integers(0, 40, rng.integers(0, 3000))
            grad = rng.standard_normal((ids.size, o.table.dim), np.float32)
            if at == 1:
                bags = Bags.from_input(ids, np.arange(0, ids.size, 2))
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
    bad: list[tuple[type[Exception], Any, Any]] = [
        (IdError, [4], ones),
        (NonFiniteError, [0], ones * np.nan),
        (ArgumentError, [0, 1], ones),
        (ArgumentError, SparseGrad(np.array([0]), ones), ones),
    ]
    for error, ids, grad in bad:
        with pytest.raises(error):
            step_many([(made[0], [1], ones), (made[1], [1], ones), (made[2], ids, grad)])
    with pytest.raises(ArgumentError, match="given twice"):
        step_many([(made[0], [1], ones), (made[0], [1], ones)])
    assert not any(t.weight.any() for t in tables)
    assert [o.steps for o in made] == [0, 0, 0]
    step_many([])


REFUSALS: dict[str, type[Exception]] = {
    "a sum that overflows": NonFiniteError,
    "a frozen layer": ArgumentError,
    "a file to be read": ReadOnlyError,
    "an array to be read": ReadOnlyError,
    "a closed table": ClosedError,
    "a bad rate": ArgumentError,
    "the last lazy step": ArgumentError,
    "a norm of its own": ArgumentError,
    "nothing accumulated": ArgumentError,
}


def refused(reason: str, folder: Path) -> optim.Optimizer:
    """An optimizer with gradients accumulated, whose step is refused."""
    array = np.zeros((4, 2), np.float32)
    options: dict[str, Any] = {}
    table = Table.from_array(array)
    if reason == "a file to be read":
        Table.create(folder / "third", 4, 2).close()
        table = Table.open(folder / "third", "r")
    elif reason == "an array to be read":
        array.flags.writeable = False
        table = Table.from_array(array)
    elif reason == "the last lazy step":
        options = {"weight_decay": 0.1, "decay_mode": "lazy"}
    elif reason == "a norm of its own":
        options = {"clip_norm": 1.0}
    layer = Embedding.from_pretrained(table, freeze=False)
    o = optim.SGD(layer, **options)
    if reason == "nothing accumulated":
        return o
    for _ in range(2):
        o.accumulate([1], ONES * (3e38 if reason == "a sum that overflows" else 1))
    if reason == "a frozen layer":
        layer.frozen = True
    elif reason == "a closed table":
        table.close()
    elif reason == "a bad rate":
        o.lr = lambda step: -1.0
    elif reason == "the last lazy step":
        o.steps = MAX_LAZY_STEPS
    return o


@pytest.mark.parametrize("reason", REFUSALS)
def test_all_tables_or_none(reason: str, tmp_path: Path) -> None:
    """Whatever the last of three is refused for, no row changes, and what is pending still is.

    Where it can only be read, or sooner, the others are not even called dirty.
    """
    twin = optim.Adam(Table.memory(4, 2), lr=0.5)
    tables = [Table.create(tmp_path / name, 4, 2, "adam") for name in ("first", "second")]
    made = [optim.Adam(table, lr=0.5) for table in tables]
    for o in (*made, twin):
        for ids in ([0, 3, 0], [3, 1]):
            o.accumulate(ids, np.ones((len(ids), 2), np.float32))
    third = refused(reason, tmp_path)
    steps = [(o, None, None) for o in (*made, third)]
    with pytest.raises(REFUSALS[reason]):
        step_many(steps, clip_norm=1.0 if "norm" in reason else None)
    assert not any(o.table.weight.any() or o.steps for o in made)
    if reason not in ("a bad rate", "the last lazy step"):
        assert [o.table.state for o in made] == ["clean", "clean"]
    if reason != "a closed table":
        assert not third.table.weight.any() and third.steps in (0, MAX_LAZY_STEPS)
    step_many(steps[:2])
    twin.step()
    for o in made:
        assert o.steps == 1 and np.array_equal(o.table.weight, twin.table.weight)
        with pytest.raises(ArgumentError, match="nothing was accumulated"):
            o.step()
        o.table.close()
    third.table.close()


@given(several=st.lists(batches(), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_what_was_accumulated(several: list[Batch], seed: int, num_threads: int) -> None:
    """A step without ids applies the accumulated gradients, among steps that get ids."""
    many: list[Any] = []
    single: list[Any] = []
    for at, batch in enumerate(several):
        name, ids = list(RULES)[(seed + at) % len(RULES)], batch.ids.ravel() % 64
        grad = batch.grad().reshape(ids.size, batch.dim)
        for steps in (many, single):
            o = RULES[name](Table.memory(64, batch.dim, num_threads=num_threads), lr=0.1)
            if (seed + at) % 2:
                steps.append((o, ids, grad))
                continue
            for part in (slice(0, ids.size // 2), slice(ids.size // 2, None)):
                o.accumulate(ids[part], grad[part])
            steps.append((o, None, None))
    step_many(many)
    for (o, _, _), (other, ids, grad) in zip(many, single, strict=True):
        other.step(ids, grad)
        assert np.array_equal(o.table.weight, other.table.weight) and o.steps == other.steps == 1


@pytest.mark.parametrize("on", ["memory", "disk"])
def test_several_over_one_table(on: str, tmp_path: Path, num_threads: int) -> None:
    """They step in the order given, also two of one rule, which share the count of steps."""
    tables, start = [], init.normal(std=1.0)
    for name in "ab":
        more: dict[str, Any] = {
            "optimizer": "adam",
            "columns": {"momentum_buffer": 64},
            "init": start,
        }
        if on == "disk":
            tables.append(Table.create(tmp_path / name, 90, 64, num_threads=num_threads, **more))
        else:
            tables.append(Table.memory(90, 64, num_threads=num_threads, **more))
    rng = np.random.default_rng(2)
    made = []
    for table in tables:
        padded = Embedding(90, 64, table=table, padding_idx=3)
        made.append([optim.Adam(table, 0.1), optim.SGD(table, 0.1, 0.9), optim.Adam(padded, 0.3)])
        made[-1].append(optim.SGD(Table.memory(90, 64)))
    for _ in range(3):
        batch = [rng.integers(0, 90, 800) for _ in range(4)]
        grads = [rng.standard_normal((800, 64), np.float32) for _ in range(4)]
        step_many(zip(made[0], batch, grads, strict=True))
        for o, ids, grad in zip(made[1], batch, grads, strict=True):
            o.step(ids, grad)
    for o, other in zip(*made, strict=True):
        assert o.steps == other.steps
        for name in o.table.columns:
            assert np.array_equal(o.table.column(name), other.table.column(name))
    assert made[0][0].steps == 6
    for table in tables:
        table.close()


# --- one norm -------------------------------------------------------------------------------------


def clipped_by_hand(
    steps: list[Step], twins: list[optim.Optimizer], most: float, padding: list[int]
) -> None:
    """Single steps with sums that were scaled here, by the reference's norms."""
    sums, total = [], 0.0
    for (o, ids, grad), skip_row in zip(steps, padding, strict=True):
        groups = kernels.group(ids, o.table.rows)
        sums.append((groups[0], kernels.sum_groups(*groups, grad)))
        skip = o.nonfinite == "skip_row"
        total += kernels.global_norm(*sums[-1], skip_row, skip) ** 2
    scale = np.float32(min(1.0, most / (math.sqrt(total) + 1e-6)))
    for twin, (rows, values) in zip(twins, sums, strict=True):
        twin.step(SparseGrad(rows, scale * values))


@given(
    several=st.lists(batches(), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    most=st.sampled_from([0.0, 0.01, 1.0, 30.0, 1e6]),
)
def test_clip_norm_is_scaling_by_hand(
    several: list[Batch], seed: int, most: float, num_threads: int
) -> None:
    """Every rule, any batches, some with a padding row: the bits of steps with scaled sums."""
    steps, twins = [], []
    for at, batch in enumerate(several):
        name, ids = list(RULES)[(seed + at) % len(RULES)], batch.ids.ravel() % 64
        shape, pad = (64, batch.dim), 0 if at % 2 else None
        tables = [
            Table.memory(*shape, init=init.normal(), num_threads=each) for each in (num_threads, 1)
        ]
        layers = [Embedding(*shape, table=table, padding_idx=pad) for table in tables]
        one, other = (RULES[name](layer, lr=0.1) for layer in layers)
        steps.append((one, ids, batch.grad().reshape(ids.size, batch.dim)))
        twins.append(other)
    step_many(steps, clip_norm=most)
    padding = [0 if at % 2 else -1 for at in range(len(steps))]
    clipped_by_hand(steps, twins, most, padding)
    for (o, _, _), twin in zip(steps, twins, strict=True):
        assert np.array_equal(o.table.weight, twin.table.weight)


@pytest.mark.parametrize("accumulated", [False, True])
def test_clip_norm_of_large_batches(accumulated: bool, simd: str, num_threads: int) -> None:
    """The same bits for any number of threads, which are those by hand; also accumulated.

    The norm is numpy's in float64; the tolerance is for sums in float32, some near zero.
    """
    rng = np.random.default_rng(1)
    steps: list[Step] = []
    twins: list[optim.Optimizer] = []
    sums: list[np.ndarray] = []
    for dim in (33, 64, 5):
        made = [
            optim.Adagrad(Table.memory(700, dim, num_threads=w), lr=0.1) for w in (num_threads, 1)
        ]
        ids = rng.integers(0, 700, 9000)
        grad = rng.standard_normal((9000, dim), np.float32)
        steps.append((made[0], ids, grad))
        twins.append(made[1])
        sums.append(np.zeros((700, dim)))
        np.add.at(sums[-1], ids, grad.astype(np.float64))
    norm = np.linalg.norm(np.concatenate([each.ravel() for each in sums]))
    if accumulated:
        for o, ids, grad in steps:
            o.accumulate(ids, grad)
    step_many([(o, None, None) for o, _, _ in steps] if accumulated else steps, clip_norm=2.5)
    clipped_by_hand(steps, twins, 2.5, [-1] * len(steps))
    for (o, _, _), twin, each in zip(steps, twins, sums, strict=True):
        assert np.array_equal(o.table.weight, twin.table.weight)
        # Adagrad's state is the square of what it was given.
        given = np.sqrt(o.table.column("sum").astype(np.float64))
        np.testing.assert_allclose(given, np.abs(each) * 2.5 / norm, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
@pytest.mark.parametrize("most", [0.3, 1e6])
def test_one_norm_of_one_table_is_its_own(make: Any, most: float, num_threads: int) -> None:
    """With a single table clip_norm is the optimizer's keyword, bit for bit."""
    rng = np.random.default_rng(3)
    ids, grad = rng.integers(0, 40, 5000), rng.standard_normal((5000, 7), np.float32)
    one, other = (
        Table.memory(40, 7, init=init.normal(), num_threads=num_threads) for _ in range(2)
    )
    step_many([(make(one, lr=0.1), ids, grad)], clip_norm=most)
    make(other, lr=0.1, clip_norm=most).step(ids, grad)
    assert np.array_equal(one.weight, other.weight)


def test_rows_left_alone_count_for_no_norm() -> None:
    """Padding and skipped rows do not; a NaN that is let through reaches every table."""
    padded = Embedding(4, 2, table=Table.memory(4, 2), padding_idx=1)
    bare, other = Table.memory(4, 2), Table.memory(4, 2)
    steps = [
        (optim.SGD(padded, lr=1.0), [0, 1], np.array([[3, 0], [300, 400]], np.float32)),
        (
            optim.SGD(bare, lr=1.0, nonfinite="skip_row"),
            [2, 3],
            np.array([[0, 4], [np.nan, 7]], np.float32),
        ),
        (optim.SGD(other, lr=1.0), [0, 0], np.array([[6, 0], [6, 0]], np.float32)),
    ]
    step_many(steps, clip_norm=13.1)
    assert padded.weight.tolist() == [[-3, 0], [0, 0], [0, 0], [0, 0]]
    assert bare.weight.tolist() == [[0, 0], [0, 0], [0, -4], [0, 0]] and steps[1][0].skipped == 1
    assert other.weight.tolist() == [[-12, 0], [0, 0], [0, 0], [0, 0]]
    with other.writing() as weight:
        weight[:] = 0
    step_many(steps, clip_norm=1.3)
    assert other.weight[0, 0] == np.float32(1.3 / (13 + 1e-6)) * np.float32(-12)
    steps[1] = (optim.SGD(bare, lr=1.0, nonfinite="allow"), *steps[1][1:])
    step_many(steps, clip_norm=1.3)
    assert np.isnan(other.weight[0]).all() and np.isnan(padded.weight[0]).all()
    assert not padded.weight[1].any()


def test_refusals_of_one_norm() -> None:
    """A norm that is no number from 0 on, and a second one, of one of the optimizers."""
    table = Table.memory(4, 2)
    refused: list[Any] = [-1.0, float("nan"), float("inf"), "1"]
    for most in refused:
        with pytest.raises(ArgumentError, match="clip_norm = "):
            step_many([(optim.SGD(table), [1], ONES)], clip_norm=most)
    steps = [(optim.SGD(table), [1], ONES), (optim.SGD(table, clip_norm=2.0), [1], ONES)]
    with pytest.raises(ArgumentError, match="clip_norm = 2.0 of its own; allowed: one of them"):
        step_many(steps, clip_norm=1.0)
    assert not table.weight.any()
