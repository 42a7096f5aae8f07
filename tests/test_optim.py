"""Optimizers: trajectories against the reference and torch, and what a step refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Batch, batches

from pyembed import Embedding, SparseGrad, Table, init, optim, reference
from pyembed.errors import ArgumentError, DTypeError, IdError, NonFiniteError

RULES: list[Callable[..., optim.Optimizer]] = [optim.SGD, optim.Adagrad, optim.Adam]
ONES = np.ones((1, 2), np.float32)


def trajectory(make: Callable[..., optim.Optimizer], table: Table, steps: int) -> np.ndarray:
    """The weight after some steps on Zipf-like batches of varying size."""
    rng = np.random.default_rng(7)
    o = make(table, lr=0.05)
    for _ in range(steps):
        ids = np.minimum(rng.zipf(1.3, rng.integers(1, 400)) - 1, table.rows - 1)
        o.step(ids, rng.standard_normal((ids.size, table.dim), np.float32))
    return table.weight.copy()


@pytest.mark.parametrize("make", RULES)
def test_same_bits_everywhere(make: Callable[..., optim.Optimizer], path: Path, simd: str) -> None:
    """Threads, SIMD level, and where the table and its state lie change no bit of 30 steps."""
    name = make.__name__.lower()
    start = init.normal()
    tables = [Table.memory(500, 67, init=start, num_threads=n) for n in (1, 2, 3)]
    tables.append(Table.memory(500, 67, name, init=start))
    tables.append(Table.create(path, 500, 67, name, {"bias": 1}, init=start))
    results = [trajectory(make, table, 30) for table in tables]
    for result in results[1:]:
        assert np.array_equal(result, results[0])
    tables[-1].close()


@given(batch=batches(), scale=st.booleans(), pad=st.booleans())
@pytest.mark.parametrize("make", RULES)
def test_step_against_reference(
    make: Callable[..., optim.Optimizer], batch: Batch, scale: bool, pad: bool
) -> None:
    """A step is: group, sum in batch order, scale, skip the padding row, update. Bit for bit."""
    padding = int(batch.ids.flat[0]) if pad and batch.ids.size else None
    e = Embedding.from_pretrained(
        batch.table(), freeze=False, padding_idx=padding, scale_grad_by_freq=scale
    )
    o = make(e, lr=0.1)
    names = ("weight", *e.table.columns)[1:]
    expected = tuple(e.table.column(name).copy() for name in names)
    groups = reference.group(batch.ids, batch.rows)
    sums = reference.sum_groups(*groups, batch.grad().reshape(-1, batch.dim), scale)
    skip = -1 if padding is None else padding
    for _ in range(2):
        o.step(batch.ids, batch.grad())
        reference.update(expected, groups[0], sums, o.rule, o._hyper(o.steps), skip)
    for name, column in zip(names, expected, strict=True):
        assert np.array_equal(e.table.column(name), column)


@pytest.mark.parametrize("make", RULES)
def test_sparse_gradient_is_the_same_step(make: Callable[..., optim.Optimizer]) -> None:
    """step(e.backward(ids, grad)) changes what step(ids, grad) changes."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 50, (8, 9))
    grad = rng.standard_normal((8, 9, 5), np.float32)
    layers = [Embedding(50, 5, padding_idx=3, sparse=True, seed=1) for _ in range(2)]
    make(layers[0], lr=0.1).step(ids, grad)
    make(layers[1], lr=0.1).step(layers[1].backward(ids, grad))
    assert np.array_equal(layers[0].weight, layers[1].weight)


def torch_twin(rule: type, weight: np.ndarray) -> tuple[object, object]:
    torch = pytest.importorskip("torch")
    layer = torch.nn.Embedding.from_pretrained(
        torch.from_numpy(weight.copy()), freeze=False, sparse=True
    )
    twin = {"SGD": torch.optim.SGD, "Adagrad": torch.optim.Adagrad, "Adam": torch.optim.SparseAdam}
    return layer, twin[rule.__name__](layer.parameters(), lr=0.05)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own
@pytest.mark.parametrize("make", RULES)
def test_trajectory_against_torch(make: type[optim.Optimizer]) -> None:
    """200 steps end where torch's SGD, Adagrad and SparseAdam end.

    Tolerance 1e-4: torch sums duplicates in an unstable order and its float32 square root is off
    by an ulp now and then; over 200 steps of size 0.05 both differ by less than 1e-5 here.
    """
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(11)
    start = rng.standard_normal((300, 16), np.float32)
    layer, twin = torch_twin(make, start)
    table = Table.from_array(start.copy())
    o = make(table, lr=0.05)
    for _ in range(200):
        ids = rng.integers(0, 300, 100)
        grad = rng.standard_normal((100, 16), np.float32)
        o.step(ids, grad)
        twin.zero_grad()
        layer(torch.from_numpy(ids)).backward(torch.from_numpy(grad))
        twin.step()
    np.testing.assert_allclose(table.weight, layer.weight.detach().numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", RULES)
def test_empty_batch(make: Callable[..., optim.Optimizer]) -> None:
    """An empty batch changes no row; it counts as a step, as in torch."""
    e = Embedding(5, 2, seed=1)
    before = e.weight.copy()
    o = make(e)
    o.step([], np.empty((0, 2), np.float32))
    o.step(SparseGrad(np.empty(0, np.int64), np.empty((0, 2), np.float32)))
    assert np.array_equal(e.weight, before)
    assert o.steps == 2


@pytest.mark.parametrize("make", RULES)
def test_splitting_duplicates_changes_nothing(make: Callable[..., optim.Optimizer]) -> None:
    """Gradients that add up to the same sum make the same step (powers of two: exact sums)."""
    whole, split = Embedding(5, 2, seed=1), Embedding(5, 2, seed=1)
    make(whole, lr=0.1).step([3], 4 * ONES)
    make(split, lr=0.1).step([3, 3, 3], np.concatenate([2 * ONES, ONES, ONES]))
    assert np.array_equal(whole.weight, split.weight)


@pytest.mark.parametrize("make", RULES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sparse", [False, True])
def test_non_finite_gradients(
    make: Callable[..., optim.Optimizer], value: float, sparse: bool
) -> None:
    """NaN and infinity are refused before anything is written; "allow" lets them through."""
    grad = np.ones((3, 2), np.float32)
    grad[1, 1] = value
    batch = (SparseGrad(np.arange(3), grad),) if sparse else (np.arange(3), grad)
    e = Embedding(5, 2, seed=1)
    before, o = e.weight.copy(), make(e)
    with pytest.raises(NonFiniteError, match=r"\[1, 1\] = -?(nan|inf).*nonfinite='allow'"):
        o.step(*batch)
    assert np.array_equal(e.weight, before)
    assert o.steps == 0
    make(e, nonfinite="allow").step(*batch)
    assert not np.isfinite(e.weight[1, 1])


@pytest.mark.parametrize("make", RULES)
def test_bad_batches(make: Callable[..., optim.Optimizer]) -> None:
    """A batch that does not fit is refused before anything is written, and is no step."""
    e = Embedding(5, 2, seed=1)
    before, o = e.weight.copy(), make(e)
    for error, batch in [
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
    ]:
        with pytest.raises(error):
            o.step(*batch)
    assert np.array_equal(e.weight, before)
    assert o.steps == 0


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (optim.SGD, {"lr": -1.0}),
        (optim.SGD, {"lr": float("nan")}),
        (optim.SGD, {"nonfinite": "skip"}),
        (optim.Adagrad, {"eps": -1e-9}),
        (optim.Adam, {"eps": 0.0}),
        (optim.Adam, {"betas": (1.0, 0.9)}),
        (optim.Adam, {"betas": (0.9, -0.1)}),
        (optim.Adam, {"betas": (0.9,)}),
    ],
)
def test_bad_hyper_parameters(make: Callable[..., optim.Optimizer], arguments: dict) -> None:
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
    """A table on disk without the optimizer's state is refused with the call that makes one."""
    with Table.create(path, 5, 2) as t:
        with pytest.raises(ArgumentError, match=r"no column 'exp_avg'.*Table\.create"):
            optim.Adam(t)
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


def test_adam_resumes_exactly(path: Path) -> None:
    """With the step count restored, training in two sittings gives the bits of one sitting."""
    rng = np.random.default_rng(2)
    work = [(rng.integers(0, 20, 9), rng.standard_normal((9, 3), np.float32)) for _ in range(10)]
    whole = Table.memory(20, 3)
    o = optim.Adam(whole)
    for batch in work:
        o.step(*batch)
    with Table.create(path, 20, 3, "adam") as t:
        o = optim.Adam(t)
        for batch in work[:4]:
            o.step(*batch)
        t.commit(meta={"steps": o.steps})
    with Table.open(path) as t:
        o = optim.Adam(t)
        o.steps = t.meta["steps"]
        for batch in work[4:]:
            o.step(*batch)
        assert np.array_equal(t.weight, whole.weight)


def test_repr() -> None:
    """The text names the hyper-parameters."""
    assert repr(optim.Adagrad(Table.memory(1, 1), lr=0.5)) == "Adagrad(lr=0.5, eps=1e-10)"


def test_gradient_that_is_the_state() -> None:
    """A gradient that shares memory with a state column is refused, as with the weight."""
    t = Table.memory(5, 2)
    o = optim.Adagrad(t)
    for name in ("weight", "sum"):
        with pytest.raises(ArgumentError, match=r"use grad\.copy"):
            o.step(np.arange(5), t.column(name))
    assert o.steps == 0
