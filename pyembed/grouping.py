"""From a batch's ids to its unique rows: the one place that decides the order of summation.

Every sum over duplicate ids goes in the order of their positions in the batch, so it has the same
bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyembed import _core, _threads
from pyembed._checks import F32, IdArray, as_ids, as_values

__all__ = ["Groups", "SparseGrad", "dense_gradient", "group", "sum_duplicates"]

I64 = NDArray[np.int64]


class Groups(NamedTuple):
    """The unique rows of a batch of n ids.

    Attributes
    ----------
    rows : int64 array of shape (u,)
        Unique ids, ascending.
    starts : int64 array of shape (u + 1,)
        ``order[starts[k] : starts[k + 1]]`` are the positions of ``rows[k]`` in the batch.
    order : int64 array of shape (n,)
        Positions, ascending within a group.
    """

    rows: I64
    starts: I64
    order: I64


def group(ids: ArrayLike, num_rows: int, num_threads: int | None = None) -> Groups:
    """Group a batch by row: a stable parallel radix sort.

    >>> group([3, 1, 3], 4)
    Groups(rows=array([1, 3]), starts=array([0, 1, 3]), order=array([1, 0, 2]))

    Raises
    ------
    IdError
        If an id is outside ``0 .. num_rows - 1``.
    """
    return group_checked(as_ids(ids), num_rows, _threads.resolve(num_threads))


def group_checked(ids: IdArray, num_rows: int, num_threads: int) -> Groups:
    """`group` for what `as_ids` and `threads.resolve` have returned."""
    return Groups(*_core.group(ids, num_rows, _threads.for_work(4 * ids.size, num_threads)))


def group_many(
    batches: Sequence[tuple[ArrayLike, int]], num_threads: int | None = None
) -> list[Groups]:
    """`group` for many small batches at once: pairs of ids and the number of rows.

    >>> [groups.rows.tolist() for groups in group_many([([3, 1, 3], 4), ([0], 1)])]
    [[1, 3], [0]]
    """
    pairs = [(as_ids(ids), rows) for ids, rows in batches]
    size = sum(ids.size for ids, _ in pairs)
    workers = _threads.for_work(4 * size, _threads.resolve(num_threads))
    return [Groups(*arrays) for arrays in _core.group_many(pairs, workers)]


class SparseGrad(NamedTuple):
    """The gradient of a table as its touched rows.

    Attributes
    ----------
    ids : int64 array of shape (u,)
        Unique rows, ascending.
    values : float32 array of shape (u, dim)
        The gradient of each, duplicates summed.
    """

    ids: I64
    values: F32

    def to_dense(self, rows: int) -> F32:
        """The same gradient as an array of shape (rows, dim)."""
        dense = np.zeros((rows, self.values.shape[1]), np.float32)
        dense[self.ids] = self.values
        return dense


def sum_duplicates(
    ids: ArrayLike,
    grad: ArrayLike,
    num_rows: int,
    dim: int,
    scale_by_count: bool = False,
    num_threads: int | None = None,
) -> SparseGrad:
    """One row for each unique id: the sum of its gradients, in the order of the batch.

    >>> sum_duplicates([3, 1, 3], np.ones((3, 2), np.float32), 4, 2).values
    array([[1., 1.],
           [2., 2.]], dtype=float32)
    """
    ids = as_ids(ids)
    grad = as_values(grad, (*ids.shape, dim), "grad")
    groups = group(ids, num_rows, num_threads)
    values = np.empty((groups.rows.size, dim), np.float32)
    workers = _threads.for_work(grad.size, _threads.resolve(num_threads))
    _core.sum_groups(*groups, grad, values, scale_by_count, workers)
    return SparseGrad(groups.rows.copy(), values)  # not the memory of all groups


def dense_gradient(
    ids: ArrayLike,
    grad: ArrayLike,
    num_rows: int,
    dim: int,
    skip_row: int = -1,
    scale_by_count: bool = False,
    num_threads: int | None = None,
) -> F32:
    """The gradient of a whole table: an array of shape (num_rows, dim), zero outside the batch."""
    ids = as_ids(ids)
    values = as_values(grad, (*ids.shape, dim), "grad")
    groups = group(ids, num_rows, num_threads)
    dense = np.zeros((num_rows, dim), np.float32)
    workers = _threads.for_work(values.size, _threads.resolve(num_threads))
    column = _core.Column(dense)
    _core.add_groups(column, *groups, values, 1.0, skip_row, scale_by_count, workers)
    return dense
