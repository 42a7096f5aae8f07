"""Embedding: torch's lookup layer, forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyembed
from pyembed import Embedding, SparseGrad, Table
from pyembed.errors import ArgumentError, DTypeError, IdError
from tests.reference import kernels
from tests.strategies import Batch, batches


def test_fresh_weight_is_standard_normal() -> None:
    """A new layer is drawn from N(0, 1); the seed names the draw."""
    e = Embedding(2000, 50, seed=1)
    assert abs(e.weight.mean()) < 0.02
    assert abs(e.weight.std() - 1) < 0.02
    assert np.array_equal(e.weight, Embedding(2000, 50, seed=1).weight)
    assert not np.array_equal(e.weight, Embedding(2000, 50, seed=2).weight)
    assert not np.array_equal(Embedding(3, 2).weight, Embedding(3, 2).weight)


@given(batch=batches())
def test_forward(batch: Batch) -> None:
    """Rows come as a fresh array of ids.shape + (dim,)."""
    e = Embedding.from_pretrained(batch.table())
    rows = e(batch.ids)
    assert np.array_equal(rows, kernels.gather(batch.table(), batch.ids))
    rows[...] = 9
    assert np.array_equal(e.weight, batch.table())


@given(batch=batches(), scale=st.booleans(), pad=st.booleans())
def test_backward(batch: Batch, scale: bool, pad: bool) -> None:
    """Dense and sparse gradients are the same sums, in batch order, without the padding row."""
    padding = int(batch.ids.flat[0]) if pad and batch.ids.size else None
    grad = batch.grad()
    groups = kernels.group(batch.ids, batch.rows)
    sums = kernels.sum_groups(*groups, grad.reshape(-1, batch.dim), scale)
    keep = groups[0] != (-1 if padding is None else padding)
    settings: dict[str, Any] = {"padding_idx": padding, "scale_grad_by_freq": scale}
    sparse = Embedding.from_pretrained(batch.table(), sparse=True, **settings)
    got = sparse.backward(batch.ids, grad)
    assert isinstance(got, SparseGrad)
    assert np.array_equal(got.ids, groups[0][keep])
    assert np.array_equal(got.values, sums[keep])
    expected = np.zeros((batch.rows, batch.dim), np.float32)
    expected[groups[0][keep]] = sums[keep]
    dense = Embedding.from_pretrained(batch.table(), **settings)
    assert np.array_equal(dense.backward(batch.ids, grad), expected)


@given(batch=batches(), scale=st.booleans(), pad=st.booleans())
def test_backward_against_torch(batch: Batch, scale: bool, pad: bool) -> None:
    """The dense gradient is torch's.

    Exactly so without scaling, since both add in batch order; with it torch scales every gradient
    and pyembed their sum, a difference of one rounding for each addition.
    """
    torch = pytest.importorskip("torch")
    padding = int(batch.ids.flat[0]) if pad and batch.ids.size else None
    weight = torch.from_numpy(batch.table()).requires_grad_()
    out = torch.nn.functional.embedding(
        torch.from_numpy(batch.ids), weight, padding, scale_grad_by_freq=scale
    )
    out.backward(torch.from_numpy(batch.grad()))
    e = Embedding.from_pretrained(batch.table(), padding_idx=padding, scale_grad_by_freq=scale)
    got = e.backward(batch.ids, batch.grad())
    if scale:
        np.testing.assert_allclose(got, weight.grad.numpy(), rtol=1e-5, atol=1e-5)
    else:
        assert np.array_equal(got, weight.grad.numpy())


def test_nan_at_the_padding_row() -> None:
    """The padding row takes exactly no gradient, even if the incoming one is NaN."""
    grad = np.full((3, 2), np.nan, np.float32)
    grad[1] = 1
    dense = np.asarray(Embedding(4, 2, padding_idx=0).backward([0, 2, 0], grad))
    assert dense.tolist() == [[0, 0], [0, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize(("given_idx", "row"), [(0, 0), (3, 3), (-1, 3), (-4, 0)])
def test_padding_idx(given_idx: int, row: int) -> None:
    """padding_idx may count from the end; a fresh layer's padding row is zero, the others not."""
    e = Embedding(4, 3, padding_idx=given_idx, seed=0)
    assert e.padding_idx == row
    assert not e.weight[row].any()
    assert all(e.weight[other].all() for other in range(4) if other != row)
    kept = Embedding.from_pretrained(np.ones((4, 3), np.float32), padding_idx=given_idx)
    assert kept.weight.all()


@pytest.mark.parametrize("padding_idx", [4, -5, 25, -25])
def test_bad_padding_idx(padding_idx: int) -> None:
    """A padding_idx outside the table is refused."""
    with pytest.raises(ArgumentError, match=rf"padding_idx = {padding_idx}; allowed: -4\.\.3"):
        Embedding(4, 3, padding_idx=padding_idx)
    with pytest.raises(ArgumentError, match="no rows"):
        Embedding(0, 3, padding_idx=0)


def test_from_pretrained_takes_array_path_and_table(path: Path) -> None:
    """Rows are used where they are: an array, a folder, a file, a table."""
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    with Table.create(path, 3, 2) as t, t.writing(range(3)) as weight:
        weight[:] = rows
    e = Embedding.from_pretrained(rows)
    assert np.shares_memory(e.weight, rows)
    for source in (path, str(path), path / "rows.npy"):
        e = Embedding.from_pretrained(source)
        assert np.array_equal(e([2, 0]), rows[[2, 0]])
        e.table.close()
    with Table.open(path) as t:
        assert Embedding.from_pretrained(t).table is t


def test_weight_and_table_are_not_initialised() -> None:
    """A given weight or table keeps its rows, the padding row included."""
    rows = np.ones((3, 2), np.float32)
    assert (Embedding(3, 2, padding_idx=0, _weight=rows).weight == 1).all()
    table = Table.memory(3, 2)
    assert not Embedding(3, 2, table=table).weight.any()


def test_shape_mismatch() -> None:
    """A weight of another shape is refused."""
    rows = np.ones((3, 2), np.float32)
    with pytest.raises(ArgumentError, match=r"\(3, 2\); expected \(3, 4\)"):
        Embedding(3, 4, _weight=rows)
    with pytest.raises(ArgumentError, match="give one"):
        Embedding(3, 2, _weight=rows, table=Table.memory(3, 2))
    with pytest.raises(ArgumentError, match="seed"):
        Embedding(3, 2, _weight=rows, seed=1)
    with pytest.raises(DTypeError):
        Embedding(3, 2, _weight=rows.astype(float))


@pytest.mark.parametrize("sparse", [False, True])
def test_bad_batches(sparse: bool) -> None:
    """Ids and gradients that do not fit are refused by backward as by forward."""
    e = Embedding(4, 2, sparse=sparse)
    ones = np.ones((2, 2), np.float32)
    with pytest.raises(IdError):
        e([0, 4])
    with pytest.raises(IdError):
        e.backward([0, -1], ones)
    with pytest.raises(ArgumentError, match="grad has shape"):
        e.backward([0], ones)
    with pytest.raises(DTypeError, match="grad is float64"):
        e.backward([0, 1], ones.astype(float))


def test_repr() -> None:
    """The text is torch's."""
    e = Embedding(4, 3, padding_idx=-3, scale_grad_by_freq=True, sparse=True)
    assert repr(e) == "Embedding(4, 3, padding_idx=1, scale_grad_by_freq=True, sparse=True)"
    assert repr(pyembed.Embedding(4, 3)) == "Embedding(4, 3)"
