"""Optimizers: every rule against the reference, and what a step refuses."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyembed import Embedding, SparseGrad, Table, _core, init, optim, schedules
from pyembed.errors import ArgumentError, DTypeError, IdError, NonFiniteError
from tests.optim.rules import RULES, Make, every_rule
from tests.reference import kernels
from tests.strategies import Batch, batches

ONES = np.ones((1, 2), np.float32)


def trajectory(make: Make, table: Table, steps: int) -> np.ndarray:
    """The weight after some steps on Zipf-like batches of varying size."""
    rng = np.random.default_rng(7)
    o = make(table, lr=0.05)
    for _ in range(steps):
        ids = np.minimum(rng.zipf(1.3, rng.integers(1, 400)) - 1, table.rows - 1)
        o.step(ids, rng.standard_normal((ids.size, table.dim), np.float32))
    return table.weight.copy()


def test_every_rule_is_tested() -> None:
    """Every rule has an optimizer here."""
    assert list(RULES) == list(_core.RULES)
    assert all(make(Table.memory(1, 1)).rule == name for name, make in RULES.items())


@pytest.mark.parametrize("name", RULES)
def test_same_bits_everywhere(name: str, path: Path, simd: str) -> None:
    """Threads, SIMD level, and where the table and its state lie change no bit of 30 steps."""
    make = RULES[name]
    start = init.normal()
    tables = [Table.memory(500, 67, init=start, num_threads=n) for n in (1, 2, 3)]
    tables.append(Table.memory(500, 67, name, init=start))
    tables.append(Table.create(path, 500, 67, name, {"bias": 1}, init=start))
    results = [trajectory(make, table, 30) for table in tables]
    for result in results[1:]:
        assert np.array_equal(result, results[0])
    tables[-1].close()


@given(batch=batches(), scale=st.booleans(), pad=st.booleans())
@every_rule
def test_step_against_reference(make: Make, batch: Batch, scale: bool, pad: bool) -> None:
    """A step is: group, sum in batch order, scale, skip the padding row, update. Bit for bit."""
    padding = int(batch.ids.flat[0]) if pad and batch.ids.size else None
    e = Embedding.from_pretrained(
        batch.table(), freeze=False, padding_idx=padding, scale_grad_by_freq=scale
    )
    o = make(e, lr=0.1)
    names = ("weight", *e.table.columns)[1:]
    expected = tuple(e.table.column(name).copy() for name in names)
    groups = kernels.group(batch.ids, batch.rows)
    sums = kernels.sum_groups(*groups, batch.grad().reshape(-1, batch.dim), scale)
    skip = -1 if padding is None else padding
    for _ in range(2):
        o.step(batch.ids, batch.grad())
        rule = o._rule
        options = {name: getattr(rule, name) for name in kernels.NO_OPTIONS}
        kernels.update(expected, groups[0], sums, o.rule, rule.hyper, skip, options)
    for name, column in zip(names, expected, strict=True):
        assert np.array_equal(e.table.column(name), column)


@every_rule
def test_sparse_gradient_is_the_same_step(make: Make) -> None:
    """step(e.backward(ids, grad)) changes what step(ids, grad) changes."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 50, (8, 9))
    grad = rng.standard_normal((8, 9, 5), np.float32)
    layers = [Embedding(50, 5, padding_idx=3, sparse=True, seed=1) for _ in range(2)]
    make(layers[0], lr=0.1).step(ids, grad)
    make(layers[1], lr=0.1).step(layers[1].backward(ids, grad))
    assert np.array_equal(layers[0].weight, layers[1].weight)


@every_rule
def test_empty_batch(make: Make) -> None:
    """An empty batch changes no row; it counts as a step, as in torch."""
    e = Embedding(5, 2, seed=1)
    before = e.weight.copy()
    o = make(e)
    o.step([], np.empty((0, 2), np.float32))
    o.step(SparseGrad(np.empty(0, np.int64), np.empty((0, 2), np.float32)))
    assert np.array_equal(e.weight, before)
    assert o.steps == 2


@every_rule
def test_splitting_duplicates_changes_nothing(make: Make) -> None:
    """Gradients that add up to the same sum make the same step (powers of two: exact sums)."""
    whole, split = Embedding(5, 2, seed=1), Embedding(5, 2, seed=1)
    make(whole, lr=0.1).step([3], 4 * ONES)
    make(split, lr=0.1).step([3, 3, 3], np.concatenate([2 * ONES, ONES, ONES]))
    assert np.array_equal(whole.weight, split.weight)


@every_rule
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sparse", [False, True])
def test_non_finite_gradients(make: Make, value: float, sparse: bool) -> None:
    """NaN and infinity are refused before anything is written, or skipped, or let through."""
    grad = np.ones((3, 2), np.float32)
    grad[1, 1] = value
    batch = (SparseGrad(np.arange(3), grad),) if sparse else (np.arange(3), grad)
    e = Embedding(5, 2, seed=1)
    before, o = e.weight.copy(), make(e)
    with pytest.raises(NonFiniteError, match=r"\[1, 1\] = -?(nan|inf).*nonfinite='allow'"):
        o.step(*batch)
    assert np.array_equal(e.weight, before)
    assert o.steps == 0
    o = make(e, nonfinite="skip_row")
    o.step(*batch)
    assert (o.skipped, o.steps) == (1, 1)
    assert np.array_equal(e.weight[1], before[1])
    assert (e.weight[[0, 2]] != before[[0, 2]]).all()
    make(e, nonfinite="allow").step(*batch)
    assert not np.isfinite(e.weight[1, 1])


@every_rule
def test_bad_batches(make: Make) -> None:
    """A batch that does not fit is refused before anything is written, and is no step."""
    e = Embedding(5, 2, seed=1)
    before, o = e.weight.copy(), make(e)
    bad: list[tuple[type[Exception], tuple[Any, ...]]] = [
        (IdError, ([0, 5], np.ones((2, 2), np.float32))),
        (IdError, ([-1], ONES)),
        (DTypeError, ([0.5], ONES)),
        (DTypeError, ([0], ONES.astype(float))),
        (ArgumentError, ([0, 1], ONES)),
        (ArgumentError, ([0],)),
        (ArgumentError, (SparseGrad(np.array([0]), ONES), ONES)),
        (ArgumentError, (SparseGrad(np.array([1, 0]), np.ones((2, 2), np.float32)),)),
        (ArgumentError, (SparseGrad(np.array([1, 1]), np.ones((2, 2), np.float32)),)),
        (IdError, (SparseGrad(np.array([5]), ONES),)),
    ]
    for error, batch in bad:
        with pytest.raises(error):
            o.step(*batch)
    assert np.array_equal(e.weight, before)
    assert o.steps == 0


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (optim.SGD, {"lr": -1.0}),
        (optim.SGD, {"lr": float("nan")}),
        (optim.SGD, {"lr": "0.1"}),
        (optim.SGD, {"nonfinite": "skip"}),
        (optim.SGD, {"momentum": 1.0}),
        (optim.SGD, {"momentum": 0.5, "dampening": 1.5}),
        (optim.SGD, {"nesterov": True}),
        (optim.SGD, {"momentum": 0.5, "dampening": 0.1, "nesterov": True}),
        (optim.SGD, {"lazy_momentum": True}),
        (optim.SGD, {"momentum": 0.5, "lazy_momentum": True, "weight_decay": 0.1}),
        (optim.SGD, {"weight_decay": -0.1}),
        (optim.SGD, {"decay_mode": "L2"}),
        (optim.SGD, {"clip_value": -1.0}),
        (optim.SGD, {"clip_norm": float("nan")}),
        (optim.SGD, {"clip_norm": 1.0, "clip_value": 1.0}),
        (optim.SGD, {"max_norm": -1.0}),
        (optim.SGD, {"max_norm": 1.0, "norm_type": -2.0}),
        (optim.SGD, {"frequency_power": -0.5}),
        (optim.SGD, {"frequency_power": float("inf")}),
        (optim.SGD, {"frequency_power": float("nan")}),
        (optim.SGD, {"frequency_power": "0.5"}),
        (optim.Adagrad, {"eps": -1e-9}),
        (optim.RowwiseAdagrad, {"eps": 0.0}),
        (optim.RMSprop, {"alpha": 1.0}),
        (optim.Adam, {"eps": 0.0}),
        (optim.Adam, {"betas": (1.0, 0.9)}),
        (optim.Adam, {"betas": (0.9, -0.1)}),
        (optim.Adam, {"betas": (0.9,)}),
        (optim.AdamW, {"decay_mode": "l2"}),
        (optim.LAMB, {"decay_mode": "lazy"}),
        (optim.LARS, {"eta": -1.0}),
        (optim.FTRL, {"lr": 0.0}),
        (optim.FTRL, {"weight_decay": 0.1}),
        (optim.FTRL, {"l1": -1.0}),
        (optim.FTRL, {"frequency_power": 1.5}),
    ],
)
def test_bad_hyper_parameters(make: Make, arguments: dict[str, Any]) -> None:
    """Hyper-parameters out of range are refused with what is allowed."""
    with pytest.raises(ArgumentError, match="allowed"):
        make(Embedding(5, 2), **arguments)


def test_learning_rate_can_change() -> None:
    """lr is read at every step and checked when it is set."""
    t = Table.memory(2, 2)
    o = optim.SGD(t, lr=1.0)
    o.step([0], ONES)
    o.lr = 0.5
    o.step([0], ONES)
    assert t.gather(0).tolist() == [-1.5, -1.5]
    with pytest.raises(ArgumentError, match="lr"):
        o.lr = -1


def test_missing_columns_on_disk(path: Path) -> None:
    """A table on disk without the optimizer's state is refused with the command that adds it."""
    with Table.create(path, 5, 2) as t:
        command = f"pyembed convert {path} -o NEW --add exp_avg:2 --add row_exp_avg_sq:1"
        with pytest.raises(ArgumentError, match=re.escape(command)):
            optim.PartialRowwiseAdam(t)
        optim.SGD(t)


def test_column_of_another_width() -> None:
    """A user's column with a state's name and another width is not taken for the state."""
    with pytest.raises(ArgumentError, match="column 'sum' has width 1; expected 2"):
        optim.Adagrad(Table.memory(5, 2, columns={"sum": 1}))


def test_frozen() -> None:
    """A frozen layer is refused, when the optimizer is made and when it steps."""
    e = Embedding.from_pretrained(np.ones((3, 2), np.float32))
    with pytest.raises(ArgumentError, match="freeze=False"):
        optim.SGD(e)
    e.frozen = False
    o = optim.SGD(e)
    e.frozen = True
    with pytest.raises(ArgumentError, match="frozen"):
        o.step([0], ONES)


def test_target() -> None:
    """Anything but a layer or a table is refused."""
    with pytest.raises(DTypeError, match="ndarray"):
        optim.SGD(np.ones((3, 2), np.float32))  # type: ignore[arg-type]


@every_rule
def test_training_resumes_exactly(make: Make, path: Path) -> None:
    """A training that continues after the table is reopened has the bits of one without a break."""
    rng = np.random.default_rng(2)
    work = [(rng.integers(0, 20, 9), rng.standard_normal((9, 3), np.float32)) for _ in range(10)]
    lr = schedules.cosine(0.1, 10)
    whole = Table.memory(20, 3)
    o = make(whole, lr=lr)
    for batch in work:
        o.step(*batch)
    with Table.create(path, 20, 3, o.rule) as t:
        o = make(t, lr=lr)
        for batch in work[:4]:
            o.step(*batch)
    with Table.open(path) as t:
        assert t.optimizer == {o.rule: {"steps": 4}}
        o = make(t, lr=lr)
        for batch in work[4:]:
            o.step(*batch)
        assert np.array_equal(t.weight, whole.weight)


def test_steps_alone_are_committed(path: Path) -> None:
    """A step count that was set by hand is kept, though no row has changed."""
    with Table.create(path, 2, 2) as t:
        optim.SGD(t).steps = 7
    with Table.open(path, "r") as t:
        assert optim.SGD(t).steps == 7
    copy = pickle.loads(pickle.dumps(Table.memory(2, 2)))
    assert optim.SGD(copy).steps == 0


def test_repr() -> None:
    """The text names the hyper-parameters."""
    t = Table.memory(1, 1)
    assert repr(optim.Adagrad(t, lr=0.5)) == "Adagrad(lr=0.5, eps=1e-10)"
    assert repr(optim.AdamW(t)).endswith("eps=1e-08, weight_decay=0.01, decay_mode='decoupled')")
    o = optim.SGD(t, schedules.linear(1.0, 5), momentum=0.5)
    assert repr(o) == "SGD(lr=linear(lr=1.0, steps=5, end=0.0), momentum=0.5)"
    assert repr(optim.SGD(t, frequency_power=0.5)) == "SGD(lr=0.001, frequency_power=0.5)"


def test_gradient_that_is_the_state() -> None:
    """A gradient that shares memory with a state column is refused, as with the weight."""
    t = Table.memory(5, 2)
    o = optim.Adagrad(t)
    for name in ("weight", "sum"):
        with pytest.raises(ArgumentError, match=r"use grad\.copy"):
            o.step(np.arange(5), t.column(name))
    assert o.steps == 0
