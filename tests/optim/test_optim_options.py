"""The step options: decay, clipping, schedules, accumulation; and properties of all rules."""

from __future__ import annotations

import math
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyembed import Embedding, EmbeddingBag, SparseGrad, Table, init, optim, schedules
from pyembed.errors import ArgumentError, NonFiniteError
from pyembed.optim.optimizer import MAX_LAZY_STEPS
from tests.optim.rules import RULES, Make, every_rule
from tests.strategies import Batch, batches

ONES = np.ones((1, 2), np.float32)


def made(rows: int = 40, dim: int = 5, **more: Any) -> Table:
    return Table.memory(rows, dim, init=init.normal(std=1.0), seed=3, **more)


def work(steps: int, rows: int = 40, dim: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches with duplicates, of which the first touches every row."""
    rng = np.random.default_rng(4)
    ids = [np.arange(rows), *(rng.integers(0, rows, 12) for _ in range(steps - 1))]
    return [(i, rng.standard_normal((i.size, dim), np.float32)) for i in ids]


def summed(ids: np.ndarray, grad: np.ndarray, rows: int) -> np.ndarray:
    dense = np.zeros((rows, grad.shape[1]))
    np.add.at(dense, ids, grad.astype(np.float64))
    return dense


def counts_of(table: Table) -> np.ndarray:
    """How often each row was touched, to be changed."""
    return table.store.columns_of({"row_steps": 1})[1].array[:, 0]


@pytest.mark.parametrize("mode", ["l2", "decoupled", "lazy"])
def test_weight_decay(mode: str) -> None:
    """Touched rows decay by 1 - lr * weight_decay; lazily, every row does so in every step.

    Tolerance: float32 against float64 over 60 steps.
    """
    t, lr, decay = made(), 0.1, 0.2
    o = optim.SGD(t, lr=lr, weight_decay=decay, decay_mode=mode)
    w = t.weight.astype(np.float64)
    for ids, grad in work(60):
        o.step(ids, grad)
        touched = np.arange(t.rows) if mode == "lazy" else np.unique(ids)
        w[touched] *= 1 - lr * decay
        w -= lr * summed(ids, grad, t.rows)
    o.catch_up()
    np.testing.assert_allclose(t.weight, w, rtol=1e-5, atol=1e-5)


def test_lazy_decay_with_momentum() -> None:
    """Both catch up together as both would have gone on in a dense optimizer."""
    t, lr, decay, momentum = made(), 0.1, 0.3, 0.8
    o = optim.SGD(
        t, lr, momentum, lazy_momentum=True, weight_decay=decay, decay_mode="lazy"
    )  # fmt: skip
    w, m = t.weight.astype(np.float64), np.zeros((40, 5))
    for ids, grad in work(60):
        o.step(ids, grad)
        m = momentum * m + summed(ids, grad, t.rows)
        w = w * (1 - lr * decay) - lr * m
    o.catch_up()
    np.testing.assert_allclose(t.weight, w, rtol=1e-5, atol=1e-5)


def test_rows_that_were_never_touched_do_not_decay() -> None:
    """A fresh row, or one appended later, has missed nothing."""
    t = made(rows=3)
    o = optim.AdamW(t, weight_decay=1.0, lr=0.1, decay_mode="lazy")
    before = t.weight.copy()
    for _ in range(5):
        o.step([0], np.ones((1, 5), np.float32))
    o.catch_up()
    assert np.array_equal(t.weight[1:], before[1:])
    assert t.column("last_step").ravel().tolist() == [5, 0, 0]


def test_lazy_steps_end_where_float32_is_exact() -> None:
    """Beyond 2^24 steps the last step of a row cannot be kept: refused, and nothing changes."""
    t = made()
    o = optim.SGD(t, lr=0.1, weight_decay=0.1, decay_mode="lazy")
    o.steps = MAX_LAZY_STEPS - 1
    o.step([1], np.ones((1, 5), np.float32))
    assert t.column("last_step")[1, 0] == MAX_LAZY_STEPS
    before = t.weight.copy()
    with pytest.raises(ArgumentError, match="16777216; call catch_up"):
        o.step([1], np.ones((1, 5), np.float32))
    assert np.array_equal(t.weight, before)
    with pytest.raises(ArgumentError, match="steps"):
        o.steps = MAX_LAZY_STEPS + 1


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, np.inf])
def test_max_norm_is_renorm_after_the_step(norm_type: float) -> None:
    """The touched rows, and no others, are scaled down as `Table.renorm` would."""
    one, two = made(), made()
    (ids, grad) = work(2)[1]
    optim.Adam(one, lr=0.1, max_norm=1.5, norm_type=norm_type).step(ids, grad)
    optim.Adam(two, lr=0.1).step(ids, grad)
    assert two.renorm(ids, 1.5, norm_type).scaled > 0
    assert np.array_equal(one.weight, two.weight)


@pytest.mark.parametrize("name", RULES)
def test_learning_rate_falls_with_the_count(name: str) -> None:
    """The first step of a row is the plain one, the n-th has lr / n ** p, in every rule.

    Here n ** p is a power of two, so that the rate is exact whatever a rule makes of it.
    """
    make = partial(optim.AdamW, weight_decay=0.0) if name == "adamw" else RULES[name]
    t, grad = made(), np.random.default_rng(5).standard_normal((4, 5), np.float32)
    o = make(t, lr=0.5, frequency_power=0.5)
    counts_of(t)[[7, 9]] = 3, 15
    o.step([5, 7, 5, 9], grad)
    for row, lr, count in [(5, 0.5, 1), (7, 0.25, 4), (9, 0.125, 16)]:
        plain = made()
        make(plain, lr=lr).step([5, 7, 5, 9], grad)
        assert np.array_equal(t.weight[row], plain.weight[row])
        assert counts_of(t)[row] == count


@pytest.mark.parametrize("name", ["sgd", "nesterov", "rowwise_adagrad", "lamb", "lars", "ftrl"])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_frequency_power_is_a_learning_rate_set_by_hand(name: str, power: float) -> None:
    """Step after step a row has the bits of an optimizer whose lr is set to lr / k ** p.

    In rules that take lr as it is: Adam's corrections would be rounded elsewhere.
    """
    lr = float(np.float32(0.3))
    counted, plain = (RULES[name](made(), lr=lr, frequency_power=p) for p in (power, 0.0))
    rng = np.random.default_rng(6)
    for k in range(1, 9):
        grad = rng.standard_normal((1, 5), np.float32)
        plain.lr = lr * math.pow(k, -power)
        counted.step([3], grad)
        plain.step([3], grad)
        assert np.array_equal(counted.table.weight, plain.table.weight)


@given(several=st.lists(st.lists(st.integers(0, 7), max_size=9), max_size=6))
def test_steps_are_counted_not_occurrences(several: list[list[int]]) -> None:
    """A count is how many batches held the row, however often; other rows keep their bits."""
    t = made(rows=8)
    o = optim.SGD(t, lr=0.1, frequency_power=0.5)
    for ids in several:
        others = np.setdiff1d(np.arange(8), ids)
        before = t.weight[others]
        o.step(np.array(ids, np.int64), np.ones((len(ids), 5), np.float32))
        assert np.array_equal(t.weight[others], before)
    counts = [sum(row in ids for ids in several) for row in range(8)]
    assert counts_of(t).tolist() == counts


def test_frequency_is_that_of_the_sum() -> None:
    """Duplicates, their sum, a SparseGrad, bags and micro-batches make the same steps.

    The gradients are powers of two, whose sums are exact.
    """
    ones, sums = np.ones((3, 5), np.float32), np.repeat(np.array([[1], [2]], np.float32), 5, 1)
    layer = EmbeddingBag.from_pretrained(made(), freeze=False, mode="sum")
    targets: list[Any] = [made(), made(), made(), layer, made()]
    split, whole, sparse, bags, parts = (
        optim.SGD(target, lr=0.1, frequency_power=0.3) for target in targets
    )
    for _ in range(3):
        split.step([3, 1, 3], ones)
        whole.step([1, 3], sums)
        sparse.step(SparseGrad(np.array([1, 3]), sums))
        bags.step(layer.bags([3, 1, 3], [0, 2]), ones[:2])
        parts.accumulate([3, 1], ones[:2])
        parts.accumulate([3], ones[:1])
        parts.step()
    for o in (whole, sparse, bags, parts):
        assert np.array_equal(o.table.weight, split.table.weight)
        assert np.array_equal(counts_of(o.table), counts_of(split.table))


def test_rows_left_alone_are_not_counted() -> None:
    """Neither the padding row nor one that is skipped: its next step has the full rate."""
    e = Embedding(4, 2, padding_idx=1, _weight=np.zeros((4, 2), np.float32))
    o = optim.SGD(e, lr=1.0, frequency_power=1.0, nonfinite="skip_row")
    for _ in range(3):
        o.step([0, 1, 2], np.array([[1, 1], [1, 1], [1, np.nan]], np.float32))
    assert counts_of(e.table).tolist() == [3, 0, 0, 0]
    o.step([2], ONES)
    assert e.weight[1:3].tolist() == [[0, 0], [-1, -1]]


def test_decoupled_decay_stays_at_the_learning_rate() -> None:
    """A row that was touched often decays as any other."""
    t = Table.from_array(np.ones((2, 2), np.float32))
    o = optim.SGD(t, lr=0.5, weight_decay=1.0, decay_mode="decoupled", frequency_power=1.0)
    counts_of(t)[0] = 9
    o.step([0, 1], np.zeros((2, 2), np.float32))
    assert (t.weight == 0.5).all()


@pytest.mark.parametrize("nesterov", [False, True])
def test_lazy_momentum_by_frequency(nesterov: bool) -> None:
    """Missed steps move a row by its count before them, as a dense loop does; they do not count.

    Tolerance: float32 against float64 over 60 steps.
    """
    lr, decay, momentum, power = 0.3, 0.1, 0.8, 0.5
    t = made()
    lazy: dict[str, Any] = {"lazy_momentum": True, "decay_mode": "lazy", "weight_decay": decay}
    o = optim.SGD(t, lr, momentum, nesterov=nesterov, frequency_power=power, **lazy)
    w, m, count = t.weight.astype(np.float64), np.zeros((40, 5)), np.zeros((40, 1))
    for ids, grad in work(60):
        o.step(ids, grad)
        count[np.unique(ids)] += 1
        g = summed(ids, grad, t.rows)
        m = momentum * m + g
        w = w * (1 - lr * decay) - lr * count**-power * (g + momentum * m if nesterov else m)
        if o.steps == 30:
            o.catch_up(np.arange(10))  # that is not seen in the end
    o.catch_up()
    assert np.array_equal(counts_of(t), count[:, 0])
    np.testing.assert_allclose(t.weight, w, rtol=1e-5, atol=1e-5)


def test_momentum_from_before_the_first_count() -> None:
    """A row that was not counted yet catches up at the full learning rate, bit for bit."""
    plain, counted = made(), made()
    make = partial(optim.SGD, lr=0.1, momentum=0.9, lazy_momentum=True)
    for t in (plain, counted):
        for ids, grad in work(5):
            make(t).step(ids, grad)
    make(plain).catch_up()
    make(counted, frequency_power=1.0).catch_up()
    assert np.array_equal(counted.weight, plain.weight)


def test_counts_end_where_float32_is_exact() -> None:
    """At 2^24 a count stays, and so does the rate."""
    t = Table.memory(1, 2)
    o = optim.SGD(t, lr=1.0, frequency_power=0.5)
    counts_of(t)[:] = 2**24 - 1
    for step in (1, 2, 3):
        o.step([0], ONES)
        assert t.weight[0].tolist() == [-step / 4096] * 2
        assert counts_of(t).tolist() == [2**24]


def test_columns_of_counts_on_disk(path: Path) -> None:
    """A table on disk without the count is refused with the command that adds it."""
    with Table.create(path, 5, 2, "adagrad") as t:
        command = re.escape(f"pyembed convert {path} -o NEW --add row_steps:1")
        with pytest.raises(ArgumentError, match=f"{command}$"):
            optim.Adagrad(t, frequency_power=0.5)
        with pytest.raises(ArgumentError, match=f"{command} --add last_step:1$"):
            optim.Adagrad(t, frequency_power=0.5, decay_mode="lazy")


def test_counts_lie_with_the_table(path: Path) -> None:
    """Training in two sittings, with a rollback, gives the bits of one.

    The columns of the table may lie in any order.
    """
    make = partial(optim.SGD, lr=0.1, momentum=0.9, lazy_momentum=True, frequency_power=0.5)
    whole, batches = made(), work(9)
    for batch in batches:
        make(whole).step(*batch)
    columns = {"last_step": 1, "row_steps": 1}
    start = init.normal(std=1.0)
    with Table.create(path, 40, 5, "momentum", columns, init=start, seed=3) as t:
        for batch in batches[:4]:
            make(t).step(*batch)
    with Table.open(path) as t:
        make(t).step(*batches[0])
        t.rollback()
        for batch in batches[4:]:
            make(t).step(*batch)
        for name in whole.columns:
            assert np.array_equal(t.column(name), whole.column(name))


def test_clip_norm_leaves_the_padding_row_out() -> None:
    """A gradient of the padding row is not applied, so it counts for no norm."""
    e = Embedding(4, 2, padding_idx=1, seed=1)
    before = e.weight.copy()
    grad = np.array([[3, 4], [300, 400]], np.float32)
    optim.SGD(e, lr=1.0, clip_norm=5.1).step([0, 1], grad)
    assert np.array_equal(e.weight[0], before[0] - grad[0])
    optim.SGD(e, lr=1.0, clip_norm=1.0).step([0, 1], grad)
    np.testing.assert_allclose(before[0] - grad[0] - e.weight[0], [0.6, 0.8], rtol=1e-5)


def test_clip_norm_beside_rows_that_are_skipped() -> None:
    """A row that is left alone counts for no norm either; one that is let through makes all NaN."""
    grad = np.array([[3, 4], [np.nan, 0]], np.float32)
    t = Table.memory(2, 2)
    o = optim.SGD(t, lr=1.0, clip_norm=5.1, nonfinite="skip_row")
    o.step([0, 1], grad)
    assert t.weight.tolist() == [[-3, -4], [0, 0]]
    assert o.skipped == 1
    optim.SGD(t, lr=1.0, clip_norm=5.1, nonfinite="allow").step([0, 1], grad)
    assert np.isnan(t.weight).all()


@every_rule
@given(batch=batches(), seed=st.integers(0, 99))
def test_a_batch_is_a_set(make: Make, batch: Batch, seed: int) -> None:
    """Permuting a batch changes nothing, and rows outside of it keep their bits.

    The gradients are integers, whose sums are exact in any order.
    """
    ids, size = batch.ids.ravel(), batch.ids.size
    grad = np.rint(4 * batch.grad().reshape(size, batch.dim))
    weight = np.resize(np.random.default_rng(1).standard_normal(997, np.float32), (64, batch.dim))
    ids = ids % 64
    shuffled = np.random.default_rng(seed).permutation(size)
    tables = [Table.from_array(weight.copy()) for _ in range(2)]
    make(tables[0], lr=0.1).step(ids, grad)
    make(tables[1], lr=0.1).step(ids[shuffled], grad[shuffled])
    assert np.array_equal(tables[0].weight, tables[1].weight)
    others = np.setdiff1d(np.arange(64), ids)
    for name in tables[0].columns:
        untouched = tables[0].column(name)[others]
        assert np.array_equal(untouched, weight[others] if name == "weight" else 0 * untouched)


@every_rule
def test_accumulated_batches_are_one(make: Make) -> None:
    """Micro-batches that are accumulated make the step of the batch that they are together."""
    one, parts = made(), made()
    rng = np.random.default_rng(5)
    ids = rng.integers(0, 40, 90)
    grad = rng.standard_normal((90, 5), np.float32)
    grad = np.rint(4 * grad)  # sums that are exact in any order
    o = make(parts, lr=0.1)
    make(one, lr=0.1).step(ids, grad)
    before = parts.weight.copy()
    for at in range(0, 90, 10):
        o.accumulate(ids[at : at + 10], grad[at : at + 10])
    assert np.array_equal(parts.weight, before)
    with pytest.raises(ArgumentError, match="accumulated"):
        o.step(ids, grad)
    o.step()
    assert np.array_equal(one.weight, parts.weight)
    assert o.steps == 1
    with pytest.raises(ArgumentError, match="nothing was accumulated"):
        o.step()


def test_accumulate_takes_what_step_takes() -> None:
    """A SparseGrad is copied, bags are summed, counts scale within a batch, NaN is refused."""
    values = np.ones((2, 2), np.float32)
    b = EmbeddingBag(4, 2, mode="sum", _weight=np.zeros((4, 2), np.float32))
    o = optim.SGD(b, lr=1.0)
    o.accumulate(b.bags([1, 1, 2], [0, 2]), values)
    o.accumulate(SparseGrad(np.array([0, 1]), values))
    values[:] = 9
    with pytest.raises(NonFiniteError):
        o.accumulate(SparseGrad(np.array([0]), np.full((1, 2), np.nan, np.float32)))
    o.step()
    assert b.weight[:, 0].tolist() == [-1, -3, -1, 0]
    e = Embedding(2, 2, _weight=np.zeros((2, 2), np.float32), scale_grad_by_freq=True)
    o = optim.SGD(e, lr=1.0)
    o.accumulate([0, 0], np.ones((2, 2), np.float32))
    o.discard()
    o.accumulate([0, 0], np.ones((2, 2), np.float32))
    o.accumulate([0], ONES)
    o.step()
    assert e.weight.tolist() == [[-2, -2], [0, 0]]


def test_learning_rate_schedule() -> None:
    """A callable gets the number of steps taken, at every step; what it returns is checked."""
    t = Table.memory(2, 2)
    o = optim.SGD(t, lr=schedules.steps(1.0, every=1, factor=0.5))
    assert o.lr == 1.0
    for _ in range(3):
        o.step([0], ONES)
    assert t.gather(0).tolist() == [-1.75, -1.75]
    assert o.lr == 0.125
    o.lr = lambda step: -1.0
    with pytest.raises(ArgumentError, match=r"lr\(3\) = -1.0"):
        o.step([0], ONES)
    assert o.steps == 3


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (schedules.constant, {"lr": -1.0}),
        (schedules.warmup, {"steps": 0, "after": 1.0}),
        (schedules.warmup, {"steps": 1, "after": -1.0}),
        (schedules.linear, {"lr": 1.0, "steps": 0}),
        (schedules.cosine, {"lr": 1.0, "steps": 5, "end": float("nan")}),
        (schedules.steps, {"lr": 1.0, "every": 0}),
        (schedules.inverse_sqrt, {"lr": 1.0, "steps": 0}),
    ],
)
def test_bad_schedules(make: Any, arguments: dict[str, Any]) -> None:
    """Parameters out of range are refused with what is allowed."""
    with pytest.raises(ArgumentError, match="allowed"):
        make(**arguments)


def test_schedules_join() -> None:
    """A warm-up hands over to a schedule, from its start; a schedule travels by pickle."""
    lr = schedules.warmup(2, schedules.linear(1.0, 2))
    assert [lr(step) for step in range(5)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert pickle.loads(pickle.dumps(lr)) == lr


@pytest.mark.parametrize("name", RULES)
def test_an_optimizer_travels_by_pickle(name: str) -> None:
    """A copy goes on where the original is."""
    rng = np.random.default_rng(6)
    o = RULES[name](made(), lr=0.1)
    batch = rng.integers(0, 40, 20), rng.standard_normal((20, 5), np.float32)
    o.step(*batch)
    copy = pickle.loads(pickle.dumps(o))
    for each in (o, copy):
        each.step(*batch)
    assert copy.steps == 2
    assert np.array_equal(copy.table.weight, o.table.weight)


def test_rollback_brings_the_steps_back(path: Path) -> None:
    """After a rollback an optimizer goes on from the last commit, rows and step count alike."""
    with Table.create(path, 5, 2, "adam") as t:
        o = optim.Adam(t, lr=0.1)
        o.step([1], ONES)
        t.commit()
        kept = t.weight.copy()
        o.step([1, 2], np.ones((2, 2), np.float32))
        t.rollback()
        assert o.steps == 1
        assert np.array_equal(t.weight, kept)
