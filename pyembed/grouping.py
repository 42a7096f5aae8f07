"""From a batch's ids to its unique rows: the one place that decides the order of summation.

Every sum over duplicate ids follows the order of their positions in the batch, so it has the same
bits for any number of threads. A `_core.Batch` holds ids and gradients from here to the kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyembed import _core, _threads
from pyembed._checks import F32, as_ids, as_values
from pyembed.errors import ArgumentError, DTypeError

__all__ = ["Groups", "SparseGrad", "dense_gradient", "group", "sum_duplicates"]

I64 = NDArray[np.int64]


class Groups(NamedTuple):
    """The unique rows of a batch of n ids.

    Parameters
    ----------
    rows : ndarray of int64, shape (u,)
        The unique ids, ascending.
    starts : ndarray of int64, shape (u + 1,)
        ``order[starts[k] : starts[k + 1]]`` are the positions of ``rows[k]`` in the batch.
    order : ndarray of int64, shape (n,)
        Positions in the batch, ascending within a group.
    """

    rows: I64
    starts: I64
    order: I64


class SparseGrad(NamedTuple):
    """The gradient of a table, only for the rows of a batch.

    Parameters
    ----------
    ids : ndarray of int64, shape (u,)
        The unique row numbers, ascending.
    values : ndarray of float32, shape (u, dim)
        The gradient of each row, duplicates summed.
    """

    ids: I64
    values: F32

    def to_dense(self, rows: int) -> F32:
        """Return the same gradient as an array of the table's shape.

        Parameters
        ----------
        rows : int
            The number of rows of the table.

        Returns
        -------
        ndarray of float32, shape (rows, dim)
            Zero at rows that are not in the batch.
        """
        dense = np.zeros((rows, self.values.shape[1]), np.float32)
        dense[self.ids] = self.values
        return dense


def group(ids: ArrayLike, num_rows: int, num_threads: int | None = None) -> Groups:
    """Group a batch by row: a stable parallel radix sort.

    Parameters
    ----------
    ids : array of integers, any shape
        Row numbers.
    num_rows : int
        The number of rows of the table.
    num_threads : int, optional
        See `Table.create`.

    Returns
    -------
    Groups
        The unique rows, and their positions in the batch.

    Raises
    ------
    IdError
        If an id is outside ``0 .. num_rows - 1``.
    DTypeError
        If the ids are not integers.

    Examples
    --------
    >>> group([3, 1, 3], 4)
    Groups(rows=array([1, 3]), starts=array([0, 1, 3]), order=array([1, 0, 2]))
    """
    batch = _core.Batch(as_ids(ids), None, num_rows, 0)
    group_batches([batch], _threads.resolve(num_threads))
    return Groups(batch.unique_rows, batch.starts, batch.order)


def group_batches(batches: list[_core.Batch], num_threads: int) -> None:
    """Group batches in place; raise `IdError` before any is grouped."""
    size = batches[0].ids.size if len(batches) == 1 else sum(batch.ids.size for batch in batches)
    _core.group(batches, _threads.for_work(4 * size, num_threads))


def read_gradient(
    ids: ArrayLike | SparseGrad,
    grad: ArrayLike | None,
    num_rows: int,
    dim: int,
    skip_row: int = -1,
    scale_by_count: bool = False,
) -> _core.Batch:
    """Read the gradient of looked-up rows, or of unique rows: all checks but those of values.

    Parameters
    ----------
    ids : integers of any shape, or a SparseGrad
    grad : float32 array of shape ids.shape + (dim,)
        None with a SparseGrad.
    num_rows, dim : int
        Shape of the table.
    skip_row : int
        The padding row, which takes no gradient; -1 for none.
    scale_by_count : bool
        Divide the sum of a row by how often the row occurs in the batch.

    Returns
    -------
    _core.Batch
        Not yet grouped, so ids may still be outside the table.

    Raises
    ------
    DTypeError, ArgumentError
    """
    batch = _core.read_batch(ids, grad, num_rows, dim, skip_row, scale_by_count)
    if batch is not None:
        return batch
    if isinstance(ids, SparseGrad):
        if grad is not None:
            raise ArgumentError("step(sparse_grad): the gradient is given twice")
        return unique_batch(ids, num_rows, dim, skip_row)
    if grad is None:
        raise ArgumentError("step(ids, grad): grad is missing")
    if hasattr(type(ids), "bag_of"):
        raise DTypeError("Bags; allowed here: ids, since the target is no EmbeddingBag")
    ids = as_ids(ids)
    values = as_values(grad, (*ids.shape, dim), "grad")
    return _core.Batch(ids, values, num_rows, dim, skip_row, scale_by_count)


def unique_batch(sparse: SparseGrad, num_rows: int, dim: int, skip_row: int) -> _core.Batch:
    """The batch of a sparse gradient, whose ids must be unique and ascending.

    Raises
    ------
    DTypeError, ArgumentError
    """
    ids = as_ids(sparse.ids).astype(np.int64, copy=False)
    values = as_values(sparse.values, (*ids.shape, dim), "values")
    if ids.ndim != 1:
        raise ArgumentError("a SparseGrad has unique ascending ids; use step(ids, grad)")
    return _core.Batch(ids, values, num_rows, dim, skip_row, unique=True)


def summed(batch: _core.Batch, num_threads: int) -> _core.Batch:
    """The grouped batch with one gradient for each unique row; itself if it is that already."""
    if batch.unique:
        return batch
    sums = _core.sum_groups(batch, num_threads)
    one_each = _core.Batch(
        batch.unique_rows, sums, batch.num_rows, batch.dim, batch.skip_row, unique=True
    )
    _core.group([one_each], 1)
    return one_each


def sum_duplicates(
    ids: ArrayLike,
    grad: ArrayLike,
    num_rows: int,
    dim: int,
    scale_by_count: bool = False,
    num_threads: int | None = None,
) -> SparseGrad:
    """Sum the gradients of each unique id, in the order of the batch.

    Parameters
    ----------
    ids : array of integers, any shape
        Row numbers.
    grad : array of float32, shape ids.shape + (dim,)
        The gradient of each looked-up row.
    num_rows, dim : int
        The shape of the table.
    scale_by_count : bool
        Whether the sum of a row is divided by the number of its positions in the batch.
    num_threads : int, optional
        See `Table.create`.

    Returns
    -------
    SparseGrad
        The unique rows and the sum of each.

    Raises
    ------
    IdError, DTypeError, ArgumentError
        If an id is outside the table, or an array has another dtype or shape.

    Examples
    --------
    >>> sum_duplicates([3, 1, 3], np.ones((3, 2), np.float32), 4, 2).values
    array([[1., 1.],
           [2., 2.]], dtype=float32)
    """
    batch = read_gradient(ids, grad, num_rows, dim, -1, scale_by_count)
    return sparse_gradient(batch, _threads.resolve(num_threads))


def sparse_gradient(batch: _core.Batch, num_threads: int) -> SparseGrad:
    """Group a batch, and sum the gradients of each unique row."""
    group_batches([batch], num_threads)
    sums = _core.sum_groups(batch, _threads.for_work(batch.ids.size * batch.dim, num_threads))
    return SparseGrad(batch.unique_rows.copy(), sums)  # a view would keep the memory of all groups


def dense_gradient(
    ids: ArrayLike,
    grad: ArrayLike,
    num_rows: int,
    dim: int,
    skip_row: int = -1,
    scale_by_count: bool = False,
    num_threads: int | None = None,
) -> F32:
    """Return the gradient of a whole table.

    Parameters
    ----------
    ids : array of integers, any shape
        Row numbers.
    grad : array of float32, shape ids.shape + (dim,)
        The gradient of each looked-up row.
    num_rows, dim : int
        The shape of the table.
    skip_row : int
        A row without gradient; -1 for none.
    scale_by_count : bool
        Whether the sum of a row is divided by the number of its positions in the batch.
    num_threads : int, optional
        See `Table.create`.

    Returns
    -------
    ndarray of float32, shape (num_rows, dim)
        Zero at rows that are not in the batch.

    Raises
    ------
    IdError, DTypeError, ArgumentError
        See `sum_duplicates`.

    Examples
    --------
    >>> dense_gradient([1, 1], np.ones((2, 2), np.float32), 2, 2)
    array([[0., 0.],
           [2., 2.]], dtype=float32)
    """
    threads = _threads.resolve(num_threads)
    batch = read_gradient(ids, grad, num_rows, dim, skip_row, scale_by_count)
    group_batches([batch], threads)
    dense = np.zeros((num_rows, dim), np.float32)
    threads = _threads.for_work(batch.ids.size * dim, threads)
    _core.add_groups(_core.Column(dense), batch, 1.0, threads)
    return dense
