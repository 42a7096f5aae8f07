"""The layers as functions of any float32 array: plain, row-strided, or an np.memmap.

The array is not copied: `renorm_` and a `max_norm` change its rows.
"""

from __future__ import annotations

from numpy.typing import ArrayLike

from pyembed._checks import F32
from pyembed.layers.embedding import Embedding
from pyembed.layers.embedding_bag import EmbeddingBag
from pyembed.table import Renormed, Table


def embedding(
    input: ArrayLike,
    weight: F32,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
) -> F32:
    """Look rows up; see `pyembed.Embedding`.

    Parameters
    ----------
    input : array of integers, any shape
        Row numbers.
    weight : ndarray of float32, shape (rows, dim)
        The rows.
    padding_idx : int, optional
        Checked, but without effect on a lookup.
    max_norm : float, optional
        Rows of the batch with a larger norm are scaled down to it first, in `weight`.
    norm_type : float
        The p of that p-norm.

    Returns
    -------
    ndarray of float32, shape input.shape + (dim,)
        A copy of the rows.

    Examples
    --------
    >>> import numpy as np
    >>> embedding([2, 0], np.eye(3, dtype=np.float32))
    array([[0., 0., 1.],
           [1., 0., 0.]], dtype=float32)
    """
    return Embedding.from_pretrained(
        weight, padding_idx=padding_idx, max_norm=max_norm, norm_type=norm_type
    )(input)


def embedding_bag(
    input: ArrayLike,
    weight: F32,
    offsets: ArrayLike | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    mode: str = "mean",
    per_sample_weights: ArrayLike | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> F32:
    """Reduce bags of rows; see `pyembed.EmbeddingBag`.

    Parameters
    ----------
    input : array of integers, shape (ids,) or (bags, ids)
        Row numbers.
    weight : ndarray of float32, shape (rows, dim)
        The rows.
    offsets : array of integers, shape (bags,), optional
        The start of each bag in a one-dimensional `input`.
    max_norm : float, optional
        Rows of the batch with a larger norm are scaled down to it first, in `weight`.
    norm_type : float
        The p of that p-norm.
    mode : {"mean", "sum", "max"}
        How the rows of a bag are reduced.
    per_sample_weights : array of float32, shape input.shape, optional
        A factor for each row, with mode "sum".
    include_last_offset : bool
        Whether `offsets` ends with the end of the last bag.
    padding_idx : int, optional
        A row that is left out of every bag.

    Returns
    -------
    ndarray of float32, shape (bags, dim)
        One row for each bag.

    Examples
    --------
    >>> import numpy as np
    >>> embedding_bag([[0, 1]], np.array([[1, 2], [3, 6]], np.float32))
    array([[2., 4.]], dtype=float32)
    """
    return EmbeddingBag.from_pretrained(
        weight,
        max_norm=max_norm,
        norm_type=norm_type,
        mode=mode,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
    )(input, offsets, per_sample_weights)


def renorm_(weight: F32, ids: ArrayLike, max_norm: float, norm_type: float = 2.0) -> Renormed:
    """Scale rows down to a norm, in place; see `pyembed.Table.renorm`.

    Parameters
    ----------
    weight : ndarray of float32, shape (rows, dim)
        The rows.
    ids : array of integers, any shape
        The row numbers of the rows to scale.
    max_norm : float
        Rows with a larger norm are scaled down to it.
    norm_type : float
        The p of that p-norm.

    Returns
    -------
    Renormed
        The number of rows that were scaled, and of rows whose norm is NaN.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.array([[3, 4], [3, 4]], np.float32)
    >>> renorm_(rows, [0], max_norm=1.0)
    Renormed(scaled=1, with_nan=0)
    >>> rows[1]
    array([3., 4.], dtype=float32)
    """
    return Table.from_array(weight).renorm(ids, max_norm, norm_type)
