"""Bags: kernels against the reference, EmbeddingBag against torch, and what is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyembed import EmbeddingBag, SparseGrad, Table, _core, functional, optim
from pyembed.errors import ArgumentError, DTypeError, IdError
from pyembed.layers.bags import Bags
from tests.reference import kernels
from tests.strategies import DIMS

MODES = ["sum", "mean", "max"]


class Case:
    """A table, a ragged batch with empty bags, a padding row that occurs, weights, a gradient."""

    def __init__(self, rows: int, dim: int, sizes: list[int], dtype: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.table = rng.standard_normal((rows, dim), np.float32)
        self.starts = np.append(0, np.cumsum(sizes)).astype(np.int64)
        self.ids: NDArray[Any] = rng.integers(0, rows, self.starts[-1]).astype(dtype)
        self.weights = rng.standard_normal(self.ids.size, np.float32)
        self.grad = rng.standard_normal((len(sizes), dim), np.float32)
        self.offsets = self.starts[:-1]

    def __repr__(self) -> str:
        return f"Case({self.table.shape}, ids={self.ids.tolist()}, starts={self.starts.tolist()})"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few rows (many duplicates) or many, empty bags among others."""
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 3, 20]), min_size=1, max_size=12))
    rows = draw(st.sampled_from([1, 2, 5, 300]))
    dtype = draw(st.sampled_from(["i4", "i8"]))
    return Case(rows, draw(DIMS), sizes, dtype, draw(st.integers(0, 2**32)))


@given(case=cases(), mode=st.sampled_from(MODES), weighted=st.booleans(), pad=st.booleans())
def test_reduce_bags(
    case: Case, mode: str, weighted: bool, pad: bool, simd: str, num_threads: int
) -> None:
    """The kernel gives the bits of the reference in every mode, with weights and padding."""
    weights = case.weights if weighted and mode == "sum" else None
    skip = int(case.ids[0]) if pad and case.ids.size else -1
    out = np.full(case.grad.shape, np.nan, np.float32)
    which = np.full(case.grad.shape, 99, np.int64)
    column = _core.Column(case.table)
    _core.reduce_bags(
        column,
        case.ids,
        case.starts,
        weights,
        mode,
        skip,
        out,
        which if mode == "max" else None,
        num_threads,
    )
    expected, winners = kernels.reduce_bags(case.table, case.ids, case.starts, weights, mode, skip)
    assert out.tobytes() == expected.tobytes()
    if mode == "max":
        assert np.array_equal(which, winners)


@given(case=cases(), pad=st.booleans())
def test_bag_dots(case: Case, pad: bool, simd: str, num_threads: int) -> None:
    """The gradient of the weights is the reference's, zero at the padding row."""
    skip = int(case.ids[0]) if pad and case.ids.size else -1
    bag_of = np.repeat(np.arange(case.starts.size - 1), np.diff(case.starts))
    ids = case.ids.astype(np.int64)
    out = np.full(ids.size, np.nan, np.float32)
    _core.bag_dots(_core.Column(case.table), ids, bag_of, case.grad, skip, out, num_threads)
    assert np.array_equal(out, kernels.bag_dots(case.table, ids, bag_of, case.grad, skip))


@given(case=cases(), weighted=st.booleans(), scale=st.booleans())
def test_sums_over_bags(
    case: Case, weighted: bool, scale: bool, simd: str, num_threads: int
) -> None:
    """Gradients are summed straight from the bags, as if there were one row for each id."""
    bag_of = np.repeat(np.arange(case.starts.size - 1), np.diff(case.starts))
    coef = case.weights if weighted else None
    groups = kernels.group(case.ids, len(case.table))
    rows, dim = case.table.shape
    batch = _core.Batch(case.ids, case.grad, rows, dim, -1, scale, bag_of, coef)
    _core.group([batch], num_threads)
    expected = kernels.sum_groups(*groups, case.grad, scale, bag_of, coef)
    assert np.array_equal(_core.sum_groups(batch, num_threads), expected)


def layer(case: Case, mode: str, **settings: Any) -> EmbeddingBag:
    return EmbeddingBag.from_pretrained(case.table.copy(), freeze=False, mode=mode, **settings)


@given(
    case=cases(),
    mode=st.sampled_from(MODES),
    weighted=st.booleans(),
    pad=st.booleans(),
    last=st.booleans(),
)
def test_against_torch(case: Case, mode: str, weighted: bool, pad: bool, last: bool) -> None:
    """Forward, weight gradient and per-sample-weight gradient are torch's.

    Tolerance 1e-5: torch fuses the multiplication with the addition and, in the backward, sums
    duplicates in an unstable order.
    """
    torch = pytest.importorskip("torch")
    padding = int(case.ids[0]) if pad and case.ids.size else None
    weights = case.weights if weighted and mode == "sum" else None
    offsets = case.starts if last else case.offsets
    b = layer(case, mode, padding_idx=padding, include_last_offset=last)
    twin = torch.from_numpy(case.table.copy()).requires_grad_()
    twin_weights = None if weights is None else torch.from_numpy(weights).requires_grad_()
    expected = torch.nn.functional.embedding_bag(
        torch.from_numpy(case.ids.astype(np.int64)),
        twin,
        torch.from_numpy(offsets),
        mode=mode,
        per_sample_weights=twin_weights,
        include_last_offset=last,
        padding_idx=padding,
    )
    bags = b.bags(case.ids, offsets, weights)
    near = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    near(b(bags), expected.detach().numpy())
    expected.backward(torch.from_numpy(case.grad))
    near(b.backward(bags, case.grad), twin.grad.numpy())
    if twin_weights is not None:
        got = b.per_sample_weights_grad(bags, case.grad)
        np.testing.assert_allclose(got, twin_weights.grad.numpy(), rtol=1e-4, atol=1e-4)


@given(case=cases(), mode=st.sampled_from(MODES), pad=st.booleans())
def test_step_is_backward_then_update(case: Case, mode: str, pad: bool) -> None:
    """A step straight from the bags changes what a step on their sparse gradient changes."""
    padding = int(case.ids[0]) if pad and case.ids.size else None
    direct, through = (layer(case, mode, padding_idx=padding, sparse=True) for _ in range(2))
    bags = direct.bags(case.ids, case.offsets)
    optim.Adagrad(direct, lr=0.1).step(bags, case.grad)
    gradient = through.backward(bags, case.grad)
    assert isinstance(gradient, SparseGrad)
    optim.Adagrad(through, lr=0.1).step(gradient)
    assert np.array_equal(direct.weight, through.weight)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_scale_grad_by_freq_divides_by_the_own_count(mode: str) -> None:
    """Each row's gradient is divided by its own count (torch 2.13 divides by another row's)."""
    ids, grad = np.array([0, 0, 0, 1, 3, 3, 4]), np.ones((1, 1), np.float32)
    b = EmbeddingBag(5, 1, mode=mode, scale_grad_by_freq=True)
    got = b.backward(ids, grad, offsets=[0])
    assert isinstance(got, np.ndarray)
    share = 1 if mode == "sum" else 1 / 7
    np.testing.assert_allclose(got[:, 0], np.array([1, 1, 0, 1, 1]) * share, rtol=1e-6)


def test_two_dimensions() -> None:
    """A 2-D input is one bag a row; include_last_offset has no meaning for it."""
    b = EmbeddingBag(10, 3, mode="sum", include_last_offset=True, seed=1)
    ids = np.array([[1, 2, 3], [4, 4, 4]])
    assert np.allclose(b(ids), b.weight[ids].sum(1))
    assert b(np.empty((4, 0), np.int64)).tolist() == [[0, 0, 0]] * 4
    assert b(np.empty((0, 4), np.int64)).shape == (0, 3)


@pytest.mark.parametrize("mode", MODES)
def test_empty_bags_are_zero(mode: str) -> None:
    """A bag without rows, or with padding alone, gives zeros and takes no gradient."""
    b = EmbeddingBag(4, 2, mode=mode, padding_idx=1, seed=1)
    assert b([1, 1, 0], offsets=[0, 2, 2]).tolist()[:2] == [[0, 0], [0, 0]]
    gradient = np.asarray(b.backward([1, 1, 0], np.ones((3, 2), np.float32), offsets=[0, 2, 2]))
    assert not gradient[1:].any()
    assert gradient[0].all()


def test_maximum_takes_the_first_of_equals_and_nan_only_first() -> None:
    """Ties go to the first row; a NaN stays if it comes first and is passed over later."""
    rows = np.array([[1, np.nan], [1, 2], [0, np.nan]], np.float32)
    b = EmbeddingBag.from_pretrained(rows, mode="max", freeze=False)
    gradient = np.asarray(b.backward([0, 1], np.ones((1, 2), np.float32), offsets=[0]))
    assert gradient[:, 0].tolist() == [1, 0, 0]
    assert np.isnan(b([0, 1], offsets=[0])[0, 1])
    assert b([1, 2], offsets=[0])[0, 1] == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0, 1],), ArgumentError, "a 1-D input needs offsets"),
        (([0, 1], [[0]]), ArgumentError, "offsets have 2 dimensions"),
        (([[0, 1]], [0]), ArgumentError, "offsets must then be None"),
        (([[[0]]],), ArgumentError, "3 dimensions; allowed: 1 or 2"),
        (([0, 1], [1]), ArgumentError, r"offsets\[0\] = 1; allowed: 0"),
        (([0, 1], [0, 3]), ArgumentError, r"offsets\[1\] = 3 is outside 0..2"),
        (([0, 1, 2], [0, 2, 1]), ArgumentError, r"offsets\[2\] = 1 is below offsets\[1\] = 2"),
        (([0, 1], [0, -1]), ArgumentError, r"offsets\[1\] = -1 is below"),
        (([0, 1], []), ArgumentError, "no bags for 2 ids"),
        (([0, 1], [0.0]), DTypeError, "ids are float64"),
        (([0.5], [0]), DTypeError, "ids are float64"),
        (([0, 7], [0]), IdError, r"ids\[1\] = 7"),
        (([0, -1], [0]), IdError, r"ids\[1\] = -1"),
        (([0], [0], np.ones(2, np.float32)), ArgumentError, "per_sample_weights has shape"),
        (([0], [0], np.ones(1)), DTypeError, "per_sample_weights is float64"),
    ],
)
def test_refusals(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    """Input for which torch returns garbage, crashes or raises different errors is refused."""
    with pytest.raises(error, match=message):
        EmbeddingBag(5, 2, mode="sum")(*arguments)
    ids, offsets, weights = (*arguments, None, None)[:3]
    with pytest.raises(error, match=message):
        functional.embedding_bag(
            ids, np.ones((5, 2), np.float32), offsets, mode="sum", per_sample_weights=weights
        )


def test_last_offset() -> None:
    """With include_last_offset the last offset must be the number of ids."""
    b = EmbeddingBag(5, 2, mode="sum", include_last_offset=True)
    assert b([0, 1, 2], [0, 3, 3]).shape == (2, 2)
    for offsets in ([], [0], [0, 2], [0, 4]):
        with pytest.raises(ArgumentError, match="include_last_offset"):
            b([0, 1, 2], offsets)


def test_settings_that_make_no_sense() -> None:
    """Modes and combinations without a meaning are refused when the layer is made or used."""
    with pytest.raises(ArgumentError, match="mode = 'avg'"):
        EmbeddingBag(5, 2, mode="avg")
    with pytest.raises(ArgumentError, match="max"):
        EmbeddingBag(5, 2, mode="max", scale_grad_by_freq=True)
    with pytest.raises(ArgumentError, match="mode='sum'"):
        EmbeddingBag(5, 2)([0], [0], np.ones(1, np.float32))
    b = EmbeddingBag(5, 2)
    with pytest.raises(DTypeError, match="Bags"):
        optim.SGD(b).step([0], np.ones((1, 2), np.float32))
    with pytest.raises(DTypeError, match="no EmbeddingBag"):
        optim.SGD(Table.memory(5, 2)).step(Bags.from_input([0], [0]), np.ones((1, 2), np.float32))
    with pytest.raises(ArgumentError, match=r"grad has shape"):
        b.backward([0, 1], np.ones((2, 2), np.float32), [0])


def test_repr() -> None:
    """The text is torch's."""
    b = EmbeddingBag(4, 3, max_norm=1.0, norm_type=1.0, mode="sum", padding_idx=1)
    expected = "EmbeddingBag(4, 3, max_norm=1.0, norm_type=1.0, mode='sum', padding_idx=1)"
    assert repr(b) == expected
