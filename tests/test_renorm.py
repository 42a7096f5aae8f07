"""renorm and max_norm: touched rows, each once, torch's rule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyembed import Embedding, EmbeddingBag, Table, _core, functional
from pyembed.errors import ArgumentError, IdError, ReadOnlyError
from tests.reference import kernels
from tests.strategies import Batch, batches

EXACT = [0.0, 1.0, 2.0, np.inf]


@given(batch=batches(), p=st.sampled_from(EXACT), share=st.sampled_from([0.0, 0.5, 2.0, np.inf]))
def test_renorm_kernel(batch: Batch, p: float, share: float, simd: str, num_threads: int) -> None:
    """The kernel gives the bits of the reference, and leaves other rows alone."""
    limit = share * batch.dim ** (0.0 if p == np.inf else 1 / max(p, 1))
    got, expected = batch.table(), batch.table()
    named = _core.Batch(batch.ids, None, batch.rows, batch.dim)
    _core.group([named], num_threads)
    counts = _core.renorm(_core.Column(got), named, limit, p, num_threads)
    assert counts == kernels.renorm(expected, batch.ids, limit, p)
    assert got.tobytes() == expected.tobytes()


@given(batch=batches(), p=st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, np.inf]))
def test_against_torch(batch: Batch, p: float) -> None:
    """The rows are torch's, to 1e-5: torch sums the norm in float32."""
    torch = pytest.importorskip("torch")
    twin = torch.from_numpy(batch.table())
    with torch.no_grad():
        torch.embedding_renorm_(twin, torch.from_numpy(batch.ids.ravel().astype(np.int64)), 0.7, p)
    t = Table.from_array(batch.table())
    t.renorm(batch.ids, 0.7, p)
    np.testing.assert_allclose(t.weight, twin.numpy(), rtol=1e-5, atol=1e-7)


def test_rows_with_nan_stay_and_are_counted() -> None:
    """A NaN in a row leaves it untouched, whichever the norm."""
    rows = np.array([[np.nan, 9], [9, 9], [0.1, 0]], np.float32)
    for p in (0.0, 0.5, 1.0, 2.0, np.inf):
        copy = rows.copy()
        assert functional.renorm_(copy, [0, 1, 2, 0], 0.5, p)[1] == 1
        assert copy[0].tobytes() == rows[0].tobytes()


def test_no_overflow() -> None:
    """A row whose squares overflow float32 is scaled (torch sets it to zero)."""
    rows = np.full((1, 4), 1e20, np.float32)
    functional.renorm_(rows, [0], 1.0)
    np.testing.assert_allclose(rows, 0.5, rtol=1e-6)


def test_zero_and_infinite_limits() -> None:
    """max_norm 0 makes zeros that keep their sign; inf changes nothing."""
    rows = np.array([[-3, 4]], np.float32)
    assert functional.renorm_(rows, [0], np.inf) == (0, 0)
    functional.renorm_(rows, [0], 0.0)
    assert rows.tobytes() == np.array([[-0.0, 0.0]], np.float32).tobytes()


def test_lookup_scales_first() -> None:
    """With max_norm a lookup returns rows that were scaled in the table, the padding row too."""
    weight = np.full((3, 2), 3, np.float32)
    e = Embedding(3, 2, padding_idx=0, max_norm=1.0, norm_type=1.0, _weight=weight)
    np.testing.assert_allclose(e([0, 1, 1]), 0.5, rtol=1e-6)
    assert weight[2].tolist() == [3, 3]
    assert weight[0, 0] == weight[1, 0] < 0.51
    b = EmbeddingBag.from_pretrained(np.full((2, 2), 3, np.float32), max_norm=1.0, mode="sum")
    np.testing.assert_allclose(np.linalg.norm(b([[1]])), 1, rtol=1e-5)


def test_nothing_is_scaled_on_error() -> None:
    """An id outside the table is refused before any row is scaled."""
    weight = np.full((3, 2), 3, np.float32)
    with pytest.raises(IdError):
        Embedding.from_pretrained(weight, max_norm=1.0)([0, 1, -1])
    with pytest.raises(IdError):
        EmbeddingBag.from_pretrained(weight, max_norm=1.0)([[0, 3]])
    assert (weight == 3).all()


def test_read_only() -> None:
    """max_norm on rows that cannot be changed is refused."""
    weight = np.full((3, 2), 3, np.float32)
    weight.flags.writeable = False
    with pytest.raises(ReadOnlyError):
        Embedding.from_pretrained(weight, max_norm=1.0)([0])


@pytest.mark.parametrize("value", [-1.0, np.nan])
def test_bad_norms(value: float) -> None:
    """A norm below 0, or none at all, is refused."""
    rows = np.ones((2, 2), np.float32)
    with pytest.raises(ArgumentError, match="allowed: 0 or more"):
        functional.renorm_(rows, [0], value)
    with pytest.raises(ArgumentError, match="allowed: 0 or more"):
        functional.renorm_(rows, [0], 1.0, value)
    with pytest.raises(ArgumentError, match="allowed: 0 or more"):
        Embedding(2, 2, max_norm=value)
